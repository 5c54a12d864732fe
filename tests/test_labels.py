"""labels.csv: what is not clear is refused with its line; nobody gets another's patient."""

import unicodedata
from pathlib import Path

import pytest

from sslus.engine.errors import InputError
from sslus.engine.labels import Label, as_known, read_labels


@pytest.fixture
def read(tmp_path):
    def read(content: str | bytes) -> list[Label]:
        path = tmp_path / "labels.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_labels(path)

    return read


HEADER = "path,label,patient\n"


def test_a_row_is_what_its_cells_say(read, tmp_path):
    rows = read(
        "\ufeffpath , label,note,patient,split\r\n"  # as a spreadsheet writes it
        'A/x.mp4, "left, ""atrial""",, "p1",train\r\n'
        "\r\n"
        f" {tmp_path}/far/../y.mp4 , right ,seen twice,p 2,test\r\n"
        ",,,,\r\n"
    )
    assert rows == [
        Label(tmp_path.resolve() / "A/x.mp4", 'left, "atrial"', "p1", "train"),
        Label(tmp_path.resolve() / "y.mp4", "right", "p 2", "test"),
    ]
    assert read("patient,path,label\rp1,x.mp4,left\r")[0].patient == "p1"


def test_what_a_split_may_be_called(read):
    names = ["train", "Test", "VAL", "valid", "Validation"]
    rows = read(
        "path,label,patient,split\n" + "".join(f"{name},l,{name},{name}\n" for name in names)
    )
    assert [row.split for row in rows] == ["train", "test", "val", "val", "val"]
    assert [row.held_out for row in rows] == [False, True, True, True, True]
    assert not read(HEADER + "a.mp4,left,p1\n")[0].held_out


@pytest.mark.parametrize("there, named", [("NFD", "NFC"), ("NFC", "NFD")])
def test_an_accent_is_found_in_either_form(there, named):
    folder = Path("/" + unicodedata.normalize("NFC", "josé"))  # of a form of its own
    video, other = (folder / unicodedata.normalize(form, "é.mp4") for form in (there, named))
    assert as_known([other, folder / "e.mp4"], {video: 1}) == [video, folder / "e.mp4"]
    assert as_known([other], {video: 1, other: 2}) == [other]


def test_a_name_may_begin_and_end_with_a_space(read, tmp_path):
    (row,) = read(HEADER + '" a.mp4", left, p1\n')
    folder = tmp_path.resolve()
    odd, other = folder / " a.mp4", folder / "b " / "a.mp4"
    assert as_known([row.path], {odd: 1, other: 2}) == [odd]
    assert as_known([folder / "b/a.mp4"], {odd: 1, other: 2}) == [other]
    with pytest.raises(InputError, match="/ a.mp4' and '.*/a.mp4': only spaces tell"):
        as_known([row.path], {odd: 1, folder / "a.mp4": 2})


def test_a_patient_is_the_same_in_either_form(read):
    rows = [
        ",".join(["{}.mp4", *(unicodedata.normalize(form, "é") for _ in range(2))]).format(form)
        for form in ("NFC", "NFD")
    ]
    first, second = read(HEADER + "\n".join(rows))
    assert (first.label, first.patient) == (second.label, second.patient) == ("é", "é")


@pytest.mark.parametrize(
    "content, said",
    [
        # Each of these would give a video the wrong patient, in silence.
        (HEADER + "A/x.mp4,left, atrial,p1\n", "line 2: want 3 cells like the header, got 4; put"),
        (HEADER + 'a.mp4,"left,p1\nb.mp4,left",p2\n', "line 3: the label has a line break"),
        ("path,label,patient,patient\na.mp4,left,p1,p2\n", r"each once, got path,.*,patient$"),
        (HEADER + "a.mp4,left,p1\n./a.mp4,left,p2\n", "line 3: ./a.mp4 is already in line 2"),
        (HEADER + "\u00e9.mp4,left,p1\ne\u0301.mp4,left,p2\n", "line 3: .* is already in line 2"),
        # A line is that of an editor, whatever stands above it.
        (HEADER + "\n\r\n,,\na.mp4,,p1\n", "line 5: the label is empty"),
        (HEADER + 'a.mp4,left,p1\n\nb.mp4,"left,p1\n', "line 4: unexpected end of data; are the"),
        (HEADER + "\na.mp4,left\n", "line 3: want 3 cells like the header, got 2"),
        (HEADER + "a\0.mp4,left,p1\n", "line 2: has a NUL character"),
        (HEADER.encode("utf-16-le"), "line 1: has a NUL character, .*; save it as UTF-8"),
        ("path,label,patient,split\na,l,p,train\n\nb,l,p,test\n", "line 4: patient p is in both"),
        ("path,label,patient,split\na,l,p,dev\n", "line 2: split must be one of train, test, va"),
        ("path,label,patient,split\na,l,p,val\nb,l,p,train\n", "p is in both val and train"),
        ("path,label,patient,split\na,l,p,\nb,l,q,test\n", "split is given for some rows only"),
        ("path;label;patient\na;l;p\n", "want the columns .*, got path;label;patient; put commas"),
        ("file,MRN,label\na,p,l\n", "got file,MRN,label; rename yours, other columns may stay$"),
        ("", "want the columns .*, got an empty file$"),
        (HEADER, "no rows under the header"),
        ((HEADER + "a,é,p\n").encode("latin-1"), "is not UTF-8 .*; save it as UTF-8"),
    ],
)
def test_what_is_not_clear_is_refused_in_one_line(read, content, said):
    with pytest.raises(InputError, match=said) as e:
        read(content)
    assert "\n" not in str(e.value) and "labels.csv" in str(e.value)
