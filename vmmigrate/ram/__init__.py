"""What to send of a guest's RAM, how it is laid out in records, when to stop, and how it is proved equal. Pure."""
