"""
From text to the packed sequences that teacher and student read.

chats         chats as rows hold them, in one shape
corpus        tokenised documents on disk
documents     files, datasets and the standard library's source as documents
facts         what a token store says of itself
fingerprints  what proves that two runs have the same tokenizer, tokens or text
packing       sequences of equal length, packed from tokenised documents
ragged        arrays of unlike lengths on disk
singles       sequences of one document each
sources       files and datasets of any kind as rows
"""
