"""Training the small built-in model: synthetic speech, codec, language model, evaluation.

Nothing outside this package imports it, and nothing at this level imports anything heavy. The codec is trained in
PyTorch (the ``train`` extra); only the modules that need it import it. Each step is one command::

    python -m moshi_mlx_training.codec.data      --help    synthesize hours of labelled speech
    python -m moshi_mlx_training.codec.train     --help    train the codec
    python -m moshi_mlx_training.codec.finetune  --help    tune the decoder alone on the answering voice
    python -m moshi_mlx_training.codec.evaluate  --help    STOI, PESQ, mel distance, phones, recognised sentences
    python -m moshi_mlx_training.codec.export    --help    write the published file format
    python -m moshi_mlx_training.codec.people    --help    the codec judged by recordings of people
    python -m moshi_mlx_training.lm.data         --help    synthesize questions and answers, encode them
    python -m moshi_mlx_training.lm.train        --help    train the language model
    python -m moshi_mlx_training.lm.evaluate     --help    exact answers, silence, interruption, by ear
    python -m moshi_mlx_training.lm.judge        --help    the same by what was never taught
    python -m moshi_mlx_training.lm.export       --help    write the published file format
"""
