"""Bridges to training frameworks; nothing here is imported by the rest of automatch."""
