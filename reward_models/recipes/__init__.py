"""Offline procedures that make a judge: an instruction for a frozen one, or a small trained one."""
