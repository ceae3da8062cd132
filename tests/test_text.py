from starlm.text import printable


def test_control_characters_are_spelt_out():
    assert printable("a\x1b[2J\tb\n\x07\x9b\r\0") == "a\\x1b[2J\tb\n\\x07\\x9b\\x0d\\x00"
