"""Which layouts does a world allow, and which of them is fastest?"""
