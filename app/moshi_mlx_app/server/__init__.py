"""The server behind ``moshi-mlx-local web``: the page, and Kyutai's WebSocket protocol, on one loaded model.

::

    GET /              the page: files of the folder static/, and nothing else
    GET /api/info      what is served here, as JSON
    GET /api/link.svg  the QR code of the link for other devices
    GET /api/chat      a WebSocket; one conversation each

``door`` takes connections, ``guard`` says who may come in, ``line`` who waits, ``talk`` is one connection, ``wire``
knows bytes, ``settings`` the query, ``engine`` what computes, ``server`` puts them together. The conversation itself is
the library's.
"""
