"""What a trained network is for: scores over a data set, and label maps of pictures."""
