"""A whole migration on one machine: two daemons, a guest that writes memory all the time, proof that it is whole."""
