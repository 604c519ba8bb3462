"""Write the images in parquet files, as Hugging Face has them, into folders that --data-path reads.

    python results/unpack_parquet.py data imagenet  # data/train-*.parquet to imagenet/train/0000/..

The columns are "image", a struct with the file's "bytes", and "label", a number.
"""
import argparse
import pathlib
import sys


def get_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=pathlib.Path, help="folder of the parquet files")
    parser.add_argument("target", type=pathlib.Path, help="folder to write to")
    return parser.parse_args(argv)


def main(args):
    """Write a file for each row, into a folder for each label."""
    try:
        import pyarrow.parquet
    except ImportError:
        print("error: pyarrow is not installed: pip install pyarrow", file=sys.stderr)
        sys.exit(2)
    files = sorted(args.source.glob("*.parquet"))
    if not files:
        print(f"error: {args.source} holds no *.parquet; check the path", file=sys.stderr)
        sys.exit(2)
    for file in files:
        part = file.name.split("-")[0]                    # train, validation or test
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(256, columns=["image", "label"])
        for k, batch in enumerate(batches):
            for i, row in enumerate(batch.to_pylist()):
                path = args.target / part / f"{row['label']:04d}" / f"{file.stem}-{k}-{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(row["image"]["bytes"])


if __name__ == "__main__":
    main(get_args())
