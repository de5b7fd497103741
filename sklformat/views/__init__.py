"""Views: caches and runs as people look at them; nothing here needs torch.

curves   training runs on one sheet
page     a stretch of text with what teachers and students said of each token, as one file of HTML
serving  that page on this machine alone
"""
