"""What serves the seven files of the paper: read when needed, in this order.

    shapes.py        the generated world: ten shapes, ten motions; numpy only
    reading.py       from files to RGB images, and to data sets that survive damaged files
    layouts.py       what lies in a folder: which files are samples, of which class, of which part
    sources.py       where images and clips come from: folders, tar shards, torchvision, the generated world
    data.py          what a network sees of a file, in which order, on which rank; python -m support.data
    pictures.py      what a person looks at: grids, animations, videos; python -m support.pictures
    curves.py        the learning curves that it draws
    runtime.py       what is not the paper: user errors, flags, processes, signals, files, downloads
    loops.py         what both training loops share: lengths, means, the log, skipped steps, saving
    pickles.py       a checkpoint file, whoever wrote it: read, and nothing in it run
    checkpoints.py   what is in a file, ours and the published ones; python -m support.checkpoints
    codec.py         files through a tokenizer: what `python tokenizer.py` does
    tokens.py        beside train_ar.py: the tokens of a whole data set in one file, which all ranks fill
    drawn.py         beside sample.py: what becomes of samples, a grid or one npz file
    sets.py          beside evaluate.py: sets of samples, their statistics and distances
    metrics.py       beside evaluate.py: every metric as a lecture; tables.json has the paper's tables

What the words mean, everywhere in this project:

    z, q             the encoder's vector at one place of the grid; what quantisation makes of it
    token            a place in the grid, and what stands there
    bit              one of the K signs of q, 1 for +1; bit 0 is channel 0
    id               the bits of a token as one integer, 0 .. 2^K - 1; the first bit is the lowest
    sub-token        a slice of the bits of a token as an integer; the transformer draws M of them, one by one
    codebook         all vectors that q can be; of VQ a table, of LFQ {-1, 1}^K, which nobody stores
    usage            the fraction of all ids that occurred; a bit that never changes is dead
    image, clip      what is read: pixels of one moment, or of T frames; an image is a clip of one frame
    sample           what was drawn by a transformer
    label, class     the number of a class; what it stands for, by name
    view             what a network sees of a file: its size, crop, flip, number of frames
    part             train, val or test: which share of a data set this is; None where it is not parted
    step, epoch      one update of the weights, counted from 0; as many steps as take each image once
    rank             one of the processes that train or draw together; rank 0 writes
    micro-batch      what goes through a network at once; --accumulation of them on each rank make a step
    raw, EMA         the weights that are trained; their moving average, which draws better
    clean, official  how evaluate.py measures: as one would today, or as the published numbers were made
"""
