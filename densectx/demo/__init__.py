"""``densectx demo``: a page on this machine to try a model on pictures.

The server is the standard library's asyncio, the page is plain HTML, CSS and JavaScript in ``static``. gradio was
weighed and left out: 6.31 needs Pillow < 13 (the reader is tested with 13), installs 210 MB, looks its makers' hosts up
unless a variable forbids it, and has none of what the page is for: a divider with arrow keys, areas per class, the
receptive field under the pointer.

:mod:`~densectx.demo.wire` is HTTP, :mod:`~densectx.demo.guard` says who may ask, :mod:`~densectx.demo.server` answers,
:mod:`~densectx.demo.jobs` runs the model in one thread, :mod:`~densectx.demo.answers` makes pictures of what it says.
"""
