"""The mechanism: export, the compile loop, verification, the speed gate, reports."""
