"""Dense to modular and back, on a real model: locate, partition, convert, merge, save and load."""
