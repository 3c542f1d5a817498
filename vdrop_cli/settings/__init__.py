"""Every setting of every command."""
