"""What a run leaves behind and shows: its folder, checkpoints, progress, traces and pictures.

`RunFolder` is the folder, written as the run goes and readable however it ended; `Checkpoints` are
what `fedsys train resume=RUN` continues from. Importing the room loads no torch: reports of runs
are made without it.
"""

from fedsys import TYPE_CHECKING, face

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Progress",
    "Recorder",
    "RunFolder",
    "default_path",
]

if TYPE_CHECKING:
    from fedsys.runs.checkpoint import Checkpoint, Checkpoints
    from fedsys.runs.folder import RunFolder, default_path
    from fedsys.runs.progress import Progress
    from fedsys.runs.tracing import Recorder
else:
    __getattr__, __dir__ = face(
        __name__,
        {
            "checkpoint": "Checkpoint Checkpoints",
            "folder": "RunFolder default_path",
            "progress": "Progress",
            "tracing": "Recorder",
        },
    )
