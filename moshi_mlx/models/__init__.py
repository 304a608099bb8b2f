"""The networks: Helium with its depth transformer, the codec Mimi, and sampling."""
