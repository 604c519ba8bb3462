"""Write the images in parquet files, as Hugging Face has them, into folders that --data-path reads.

    python results/unpack_parquet.py data imagenet  # data/train-00000-of-00294.parquet: imagenet/train/0000/..

The columns are "image", a struct with the file's "bytes", and "label", a number. Needs pyarrow.
"""
import pathlib
import sys

import pyarrow.parquet

source, target = map(pathlib.Path, sys.argv[1:])
for file in sorted(source.glob("*.parquet")):
    part = file.name.split("-")[0]                        # train, validation or test
    batches = pyarrow.parquet.ParquetFile(file).iter_batches(256, columns=["image", "label"])
    for k, batch in enumerate(batches):
        for i, row in enumerate(batch.to_pylist()):
            path = target / part / f"{row['label']:04d}" / f"{file.stem}-{k}-{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row["image"]["bytes"])
