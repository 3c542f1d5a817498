"""What `vdrop bench` measures, how, and how it reports it."""
