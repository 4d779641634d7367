"""What every kind of actor and worker needs, whatever it computes."""
