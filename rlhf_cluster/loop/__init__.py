"""What the driver decides between iterations, without processes: which rows are trained on, the KL coefficient and the
score normaliser, the limits of the run."""
