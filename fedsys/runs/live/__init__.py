"""The live page of a run or an endpoint (``dashboard=true``), served by a process of its own.

::

    the run ── writes ──▶ its folder ◀── reads ── this process ◀── asks, once a second ── a browser
                                      (`snapshot`)   (`server`)                    (`script`)

It reads the files that the run writes anyway, with low priority, so the run is neither slowed nor
changed; it ends with the run. Of an endpoint (``fedsys serve``) it asks for the status instead
(`served`).
"""
