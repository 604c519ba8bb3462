"""What serves the seven files of the paper: read when needed, in this order.

    shapes.py        the generated world: ten shapes, ten motions; numpy only
    reading.py       from files to RGB images and to data sets that survive damaged files
    sources.py       where images and clips come from: folders, tar shards, torchvision, the generated world
    data.py          what a network sees of a file, in which order, on which rank; python -m support.data
    tokens.py        the tokens of a whole data set in one file: all ranks fill it, and draw from it
    pictures.py      what a person looks at: grids, animations, curves; python -m support.pictures
    runtime.py       what is not the paper: processes, user errors, files, logs
    pickles.py       a checkpoint file, whoever wrote it: read, and nothing in it run
    checkpoints.py   what is in a file, ours and the published ones; python -m support.checkpoints
    metrics.py       every metric as a lecture, beside evaluate.py; tables.json has the paper's tables
    sets.py          sets of samples, their statistics and distances, beside evaluate.py
    codec.py         files through a tokenizer: what `python tokenizer.py` does
"""
