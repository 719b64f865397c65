"""A window of steps under torch's profiler, readable in TensorBoard and in Perfetto."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler


class Window:
    """Profiles the steps from `window[0]` to `window[1]` into `folder`; nothing for None."""

    def __init__(self, folder: Path, window: tuple[int, int] | None):
        self.folder, self.window = folder, window
        self.running: profile | None = None

    def before(self, step: int) -> None:
        """Step number `step` (1, 2, ...) is about to be taken."""
        if self.window is None or self.running is not None or step != self.window[0]:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.folder.mkdir(parents=True, exist_ok=True)
        handler = tensorboard_trace_handler(str(self.folder), use_gzip=True)
        self.running = profile(activities=activities, profile_memory=True, on_trace_ready=handler)
        self.running.start()

    def after(self, step: int) -> None:
        """Step number `step` was taken."""
        if self.running is not None and self.window is not None and step >= self.window[1]:
            self.close()

    def close(self) -> None:
        """Write what was profiled."""
        if self.running is not None:
            self.running.stop()
            self.running = None
