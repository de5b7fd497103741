"""
Language models and tokenizers; the only door to transformers and peft.

adapters      the model that an adapter belongs to, with the adapter merged into it
attention     whether tokens see later ones, or other documents
devices       the devices that torch can use here, the ways there and back, the cores, and how processes meet
guards        transformers kept quiet, and its errors said in one line
heads         what kind of output head a model has
hub           names that are no path here, and whether the hub can be asked for them
identities    fingerprints of a model's weights and config
layers        the repeated layers of a model: found, compiled, recomputed
loading       models and tokenizers, loaded, created and saved
outputs       hidden states, logits, and the head by itself
templates     chats rendered to ids, their answers marked
tokenization  tokenizers trained and run over text
"""
