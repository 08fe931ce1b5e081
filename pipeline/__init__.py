"""The core of prefline: settings, artifacts, plan, launcher, report. It never imports torch."""

__version__ = "0.1.0"
OWNER = "prefline"
