"""The server behind ``moshi-mlx-local web``: the page, and Kyutai's WebSocket protocol, on one loaded model.

::

    GET /            the page: files of the folder static/, and nothing else
    GET /api/info    what is served here, as JSON
    GET /api/chat    a WebSocket; one conversation each

``wire`` knows bytes, ``settings`` the query, ``guard`` who may come in, ``line`` who waits, ``talk`` one connection,
``server`` puts them together. The conversation itself is the library's.
"""
