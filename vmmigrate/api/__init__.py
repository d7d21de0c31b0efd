"""The control API as others see it: what is asked and answered, and a client."""
