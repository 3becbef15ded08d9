"""Stand-ins for outside services: they speak the real protocols on loopback and keep the ground truth."""
