"""Python imports this first in every process that a test starts: no network there either."""

import network_guard  # noqa: F401
