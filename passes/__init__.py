"""The passes, one a file, and the table name -> class. Adding a pass is one line here."""

from __future__ import annotations
