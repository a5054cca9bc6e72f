"""Commands that write and read other people's files."""
