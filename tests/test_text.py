from starlm.text import printable


def test_control_characters_are_spelt_out():
    assert printable("a\x1b[2J\tb\n\x07\x9b\r\0") == "a\\x1b[2J\tb\n\\x07\\x9b\\x0d\\x00"


def test_halves_of_surrogate_pairs_are_spelt_out():
    assert printable("\udcff\U0001f600\ud83d") == "\\udcff\U0001f600\\ud83d"
