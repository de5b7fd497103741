"""Views: caches and runs as people look at them; nothing here needs torch.

curves  training runs on one sheet
"""
