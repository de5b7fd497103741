"""Views: caches and runs as people look at them; nothing here needs torch.

card        the dataset card of a cache, for a hub
characters  text as a terminal can show it
curves      training runs on one sheet
holdings    what there is to count of a cache, whole or not
overview    a cache at a glance, or how far a capture is
page        a stretch of text with what teachers and students said of each token, as one file of HTML
passage     one sequence, token by token, for a terminal
printing    what verbs print, whatever the terminal
serving     the page on this machine alone
sheets      caches on one sheet, and which sheet a path is for
stats       what a cache holds, in numbers, and what looks wrong
"""
