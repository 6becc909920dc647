"""Where the benchmarks' files come from: pinned by commit and sha256 wherever their licence lets a program fetch them.

What may not be fetched, or cannot be pinned, has an instruction instead; where the bytes are known all the same, their
sha256 still tells an altered file.
"""

from __future__ import annotations

from typing import Final

from mitigate.data.sources import Source

_AMBER: Final = "https://raw.githubusercontent.com/junyangwang0410/AMBER/534babf6bbfcce2e735c26289dedfb21cef3c939/data/"
_HALLUSION: Final = (
    "https://raw.githubusercontent.com/tianyi-lab/HallusionBench/744007c232c292942c7f80eb61edb2465482da31/"
)
_MME_TOOL: Final = (
    "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/raw/"
    "dd2950902889cd614d4edf606827240166d29381/tools/eval_tool.zip"
)
_COCO_LICENCE: Final = "pictures: terms of Flickr; annotations: see cocodataset.org/#termsofuse"


def _fetched(path: str, url: str, sha256: str, licence: str, **more: object) -> Source:
    instruction = f"download {url} and save it as {path} (sha256 {sha256[:16]}...)"
    return Source(path=path, url=url, sha256=sha256, licence=licence, instruction=instruction, **more)  # type: ignore[arg-type]


# --- COCO, shared by several benchmarks -------------------------------------------------------------------------------

COCO_PICTURES: Final = Source(
    path="../coco/val2014/",
    url=None,
    sha256=None,
    licence=_COCO_LICENCE,
    instruction=(
        "get the pictures: http://images.cocodataset.org/zips/val2014.zip (6.2 GB, 40,504 pictures; its authors "
        "publish no sha256), and unpack it so that they lie in coco/val2014/ of the data folder"
    ),
    count=None,
)


def _annotations(kind: str, split: str, *, optional: bool = False) -> Source:
    return Source(
        path=f"../coco/annotations/{kind}_{split}2014.json",
        url=None,
        sha256=None,
        licence=_COCO_LICENCE,
        instruction=(
            "get the annotations: http://images.cocodataset.org/annotations/annotations_trainval2014.zip (241 MB; its "
            f"authors publish no sha256), and put {kind}_{split}2014.json into coco/annotations/ of the data folder"
        ),
        count=None,
        optional=optional,
    )


# --- POPE -------------------------------------------------------------------------------------------------------------

_POPE: Final = "https://raw.githubusercontent.com/RUCAIBox/POPE/3df3ba1b110ecce25696989577fad583b67d4239/output/"
_POPE_FILES: Final = {
    "coco/coco_pope_random.json": "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994",
    "coco/coco_pope_popular.json": "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753",
    "coco/coco_pope_adversarial.json": "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8",
    "seem/aokvqa/aokvqa_pope_seem_random.json": "f06eecde6d6ef4a00b95a7bbb510490708a09a6a67d952b59b8bdd33ac2c7200",
    "seem/aokvqa/aokvqa_pope_seem_popular.json": "2ae5bedee3450cda52f9b033942c7b04a3917a86a110e859a66c1e41934c6ffd",
    "seem/aokvqa/aokvqa_pope_seem_adversarial.json": "2ddd3bdfa0df7a77a2cb1765ed06ac5ed190b5a093aa405b96986e862e8cdac1",
    "seem/gqa/gqa_pope_seem_random.json": "6ce488eade3770185034939fabfe742fa32ed369011c8d9c3ac77bc0c85abd94",
    "seem/gqa/gqa_pope_seem_popular.json": "dd03f06a458dd216e83233160fbf6628af9c63c84b11e99599f4fc0304b3361d",
    "seem/gqa/gqa_pope_seem_adversarial.json": "74e01b41d8308e2392e3b8d961167496ff3901c01100265d931a7a392f138a7a",
}
#: Versions that papers and other projects were measured with; their questions, or how many there are, differ.
_POPE_OLDER: Final = {
    "coco/coco_pope_random.json": (
        ("c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35", "of May 2023 (2910 rows, 144 'imange')"),
        ("cb8dec967727fbee4b9cfadf9ba1ea9968515b12063efd313d0cf8b2b4230c86", "of 4 August 2023"),
    ),
    "coco/coco_pope_popular.json": (
        ("5b16653023bf4f64d57eb0d168259de6627f5cde7538b85ebed3cc33034aa6cc", "of May 2023 (44 rows say 'imange')"),
        ("eafca6ceff32c7bbb5b2845a00c6828ec8cbaf5e04f890d6902dc46b92f96076", "of 4 August 2023"),
    ),
    "coco/coco_pope_adversarial.json": (
        ("1d8f0906a9b50c05640f6f23abfac97523be2a1bed28f7eadc63b811699b2d26", "of May 2023 (58 rows say 'imange')"),
        ("412efc6fe25eb2604f2386d536bcf713dc88327cb20c36489b1f689f89617d04", "of 4 August 2023"),
        ("207273ac3b7fdd04df206c6809b77a4e7f60360a730ade6b7e32804e8dd5602f", "of October 2023 (57 rows say 'imange')"),
        ("185d7eb49958c882f15d46c51d5c0456fbd5efbf24c57ff8b7adc6648870c6ac", "of VCD (57 rows say 'imange')"),
    ),
}

POPE: Final = (
    *(
        _fetched(
            path.rpartition("/")[2],
            _POPE + path,
            sha256,
            "MIT",
            count=3000,
            optional="seem" in path,
            older=_POPE_OLDER.get(path, ()),
        )
        for path, sha256 in _POPE_FILES.items()
    ),
    COCO_PICTURES,
    Source(
        path="../gqa/images/",
        url=None,
        sha256=None,
        licence="see cs.stanford.edu/people/dorarad/gqa",
        instruction=(
            "get the pictures: https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip (20 GB; its authors publish "
            "no sha256), and unpack it so that they lie in gqa/images/ of the data folder; only dataset=gqa needs them"
        ),
        count=None,
        optional=True,
    ),
)

# --- captions of COCO pictures ----------------------------------------------------------------------------------------

CHAIR: Final = (
    *(
        _annotations(kind, split, optional=split == "train")
        for split in ("val", "train")
        for kind in ("instances", "captions")
    ),
    COCO_PICTURES,
)
COCO_CAPTION: Final = (_annotations("captions", "val"), COCO_PICTURES)

# --- AMBER ------------------------------------------------------------------------------------------------------------

AMBER: Final = (
    _fetched(
        "query_all.json",
        _AMBER + "query/query_all.json",
        "127680ae61f7d4a92d2f7f07a8deaec07f0689b194d2c7c0f41ead7bd2c5bcf5",
        "Apache-2.0",
        count=15_220,
    ),
    _fetched(
        "annotations.json",
        _AMBER + "annotations.json",
        "db22a436c4836fbb295e60b4e80d519573077579fb7032f01b193c1bd022b797",
        "Apache-2.0",
        count=15_220,
    ),
    _fetched(
        "relation.json",
        _AMBER + "relation.json",
        "c4c1491e9bbc3209abc1888c12a1bf8413bdbab8a0d8be04b990a2e7680cf23e",
        "Apache-2.0",
        count=None,
    ),
    _fetched(
        "safe_words.txt",
        _AMBER + "safe_words.txt",
        "f92cf1123f4578a2630832fac3e6ac4de36212ea55859d3bed4fd233723f4043",
        "Apache-2.0",
        count=None,
    ),
    Source(
        path="image/",
        url=None,
        sha256=None,
        licence="not stated for the pictures",
        instruction=(
            "get the pictures from the Google Drive link under 'Image Download' of github.com/junyangwang0410/AMBER "
            "(no published sha256), and unpack them so that AMBER_1.jpg to AMBER_1004.jpg lie in amber/image/ of the "
            "data folder"
        ),
        count=1004,
    ),
)

# --- MME --------------------------------------------------------------------------------------------------------------

#: Task -> questions, and sha256 of its file in the folder ``Your_Results`` of the official tool.
_MME_TASKS: Final = {
    "existence": (60, "e17ea92527bdacd35d6feab51b06964d9272204b82464fb12835f805a50b659a"),
    "count": (60, "8e885f2e42abcae6af648282fcd2808128363a412e66fa90b119ff5118a8e22a"),
    "position": (60, "0386f6b2a8ff27f2bc78bb214f477d4bbd62f8cc6e759049acfe4b87be65bb8d"),
    "color": (60, "2c218a08e0d18b716f251b4ae58a58cd7ee8799fbda43763c20a1a0b97b892b3"),
    "posters": (294, "2565d73d220e4a70e4364848cc9e47d7ccf8e6af92ea2cabe4c07e32975cfe68"),
    "celebrity": (340, "a787ef71cdde4753005591fd9e33149ac2b415104309c1dc66d679a4d211728c"),
    "scene": (400, "244f927035255a3596f263115d7db7edeee0d364a310a8c80b8732c169848f8a"),
    "landmark": (400, "56299c035d72ad18f14838ce01fa589d72e270dae65a78ecc1264d4534397861"),
    "artwork": (400, "7aa71c678ccce1b71b05c2c1b59476041a0359d4035abae177253e766d11a8cd"),
    "OCR": (40, "97a799f2ee295f3a6f12754b48515c68f0a2a13580999308efe287ad1e1827a4"),
    "commonsense_reasoning": (140, "3fceadba7907a1ff8152821617c5d442862f7646c86d2cdef142b282198185c1"),
    "numerical_calculation": (40, "7d82c252b4e64365afa03d0882b52d142b8cf7077656287d34c3605ffe9d6d5f"),
    "text_translation": (40, "f4ab96b3f3bd1f444135d3891e76b741bf17b4eb572fb1177a587c638f058953"),
    "code_reasoning": (40, "a46fd12b1211ece5650d10f08d977b15acf25dbe126138bcfb2aa9bae5c80636"),
}

MME: Final = (
    *(
        Source(
            path=f"{task}.txt",
            url=None,
            sha256=sha256,
            licence="none stated",
            instruction=(
                f"get {_MME_TOOL} (105 kB, sha256 b8125e2a7c3418e5...), and put Your_Results/{task}.txt of it into "
                "mme/ of the data folder"
            ),
            count=count,
        )
        for task, (count, sha256) in _MME_TASKS.items()
    ),
    Source(
        path="images/",
        url=None,
        sha256=None,
        licence="on request, for research",
        instruction=(
            "get the pictures (MME_Benchmark_release_version) as the branch Evaluation of github.com/BradyFU/"
            "Awesome-Multimodal-Large-Language-Models says (no published sha256), and put those of every task into "
            "mme/images/TASK/ of the data folder"
        ),
        count=None,
    ),
)

# --- HallusionBench ---------------------------------------------------------------------------------------------------

HALLUSIONBENCH: Final = (
    _fetched(
        "HallusionBench.json",
        _HALLUSION + "HallusionBench.json",
        "ca6e0fb677dd56e5fb0e2700d06c58d01f8a6ae66e0f1773b2ac48c0a095d051",
        "BSD-3-Clause",
        count=1129,
        older=(
            ("cca188ed75365815805dac57ee22ba1e079ac8a3b7c1fd97a29503ddd8776a1a", "the version of 2023-11-13"),
            ("addcb50ebc31447d062dec83adccd83d5f717255a1fe5619041610dddf35638a", "the version of 2023-11-03"),
            ("f97f18bd389956926cad3a685bddcede8649702b8a26edecffe56837b244c9f1", "the version of 2023-10-31"),
        ),
    ),
    Source(
        path="hallusion_bench/",
        url=None,
        sha256=None,
        licence="not stated for the pictures",
        instruction=(
            "get hallusion_bench.zip from the Google Drive link under 'Dataset Download' of github.com/tianyi-lab/"
            "HallusionBench (no published sha256), and unpack it so that VD/ and VS/ lie in "
            "hallusionbench/hallusion_bench/ of the data folder"
        ),
        count=None,
    ),
)

# --- MMHal-Bench ------------------------------------------------------------------------------------------------------

MMHAL: Final = (
    Source(
        path="response_template.json",
        url=None,
        sha256=None,
        licence="not stated",
        instruction=(
            "get response_template.json of huggingface.co/datasets/Shengcao1006/MMHal-Bench (its bytes are not pinned: "
            "`mitigate data check mmhal` counts and checks its 96 rows), and put it into mmhal/ of the data folder"
        ),
        count=96,
    ),
    Source(
        path="images/",
        url=None,
        sha256=None,
        licence="terms of Flickr",
        instruction=(
            "get images/ of huggingface.co/datasets/Shengcao1006/MMHal-Bench (96 pictures, not pinned), and put them "
            "into mmhal/images/ of the data folder"
        ),
        count=96,
    ),
)
