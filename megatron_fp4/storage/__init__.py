"""Files that survive what happens to disks and hosts: whole lines, checked files, owners, locks (floor 0)."""
