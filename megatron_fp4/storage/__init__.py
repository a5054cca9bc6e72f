"""Files that survive what happens to disks and hosts: whole lines, owners, one launch a directory (floor 0)."""
