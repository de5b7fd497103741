"""Trainers on a CPU as where a GPU decodes the records: what it finds out is on its way until somebody asks for it."""

from sklformat.distill.loader import dataset, packed, sources


class Mark:
    """An event of a device that has not got there yet; knows whether somebody waited for it."""

    waited = 0

    def synchronize(self):
        self.waited += 1


def decode_on_device(monkeypatch):
    """Records are decoded as on a GPU, by torch operations; a mark for each batch, in order."""
    marks = []
    monkeypatch.setattr(sources.Sources, "decoding", lambda self, asked, device: ("cuda", "decoded on the device"))
    monkeypatch.setattr(dataset, "_check_decode", lambda *_: None)
    monkeypatch.setattr(packed, "to_host", lambda flag: (flag, marks.append(Mark()) or marks[-1]))
    monkeypatch.setattr(packed, "_unread", type(packed._unread)())
    return marks


def spoil(monkeypatch, number):
    """A record of the batch of this number loses a bit after the host has looked at its bytes."""
    real, made = packed.decode, []

    def decode(records, offsets, shape):
        made.append(1)
        if len(made) - 1 == number:
            records = records.clone()
            records[2] ^= 0x10
        return real(records, offsets, shape)

    monkeypatch.setattr(packed, "decode", decode)
