"""The server behind ``moshi-mlx-local web``: the page, and WebSocket protocols, on one loaded model.

::

    GET /              the page: files of the folder static/, and nothing else
    GET /api/info      what is served here, as JSON
    GET /api/link.svg  the QR code of the link for other devices
    GET /api/chat      a WebSocket; one conversation each

``listener`` takes connections, ``access`` says who may come in, ``queue`` who waits, ``connection`` is one client,
``protocols`` know bytes and events, ``settings`` the query, ``engine`` what computes, ``server`` joins them. The
conversation itself is the library's.
"""
