"""One module for each verb of the program.

A verb's module is named like the verb and has ``HELP`` (one line), ``EXAMPLES`` (for the end of its help),
``add_arguments(parser)`` and ``run(args)``, which returns the exit status. It imports heavy things inside ``run``, so
that ``--help`` is instant. Its name goes into ``VERBS`` in :mod:`moshi_mlx_app.cli`.
"""
