"""Model folders for the Hub, which load without this package."""
