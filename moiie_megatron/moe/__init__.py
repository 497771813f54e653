"""The MoIIE layer: routers, losses, grouped experts."""
