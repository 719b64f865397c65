"""What leaves: the files of a release, their formats, the data card, and the model."""
