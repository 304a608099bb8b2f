"""The protocols that clients speak, a file each: ``add_routes(app, server)`` adds its paths.

A conversation's protocol is a subclass of :class:`~moshi_mlx_app.server.connection.Talk`, which has the queue, the
limits and the ends. ``server.PROTOCOLS`` lists the modules.
"""
