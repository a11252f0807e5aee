# ruff: noqa: RUF001 (letters of other scripts are meant)
"""Words by which a text gives, denies or only mentions an answer.

All are in lower case and without accents, as a folded line has them. What a language says in one
word is here; what its order of words says is in lines.py.
"""

from __future__ import annotations

import unicodedata


def fold(text: str) -> str:
    """Compatible forms, no accents, no signs without a width."""
    if text.isascii():
        return text
    signs = ("Mn", "Mc", "Me", "Cf")
    kept = (c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) not in signs)
    return unicodedata.normalize("NFC", "".join(kept))


def words(*lines: str) -> frozenset[str]:
    return frozenset(fold(" ".join(lines)).lower().split())


# What names the answer, and what does with a colon or `is` behind it.
ANSWER = words(
    "answer answers ans solution Antwort Lösung réponse respuesta risposta resposta antwoord",
    "ответ відповідь cevap yanıt odpowiedź odpověď svar svaret vastaus válasz răspuns jawaban",
    "jawabannya απάντηση תשובה الجواب الإجابة إجابة उत्तर คำตอบ 正确答案 正確答案 答案 答え 正解",
    "回答 解答 答 정답 답 답변 选 選 选择 選擇",
)
OPTION = words(
    "option options choice choices letter alternative opción opção optie вариант 正确选项 选项",
    "選項 選択肢 Option alternativa",
)
ISSUE = words(
    "sentiment tone label polarity classification mood opinion attitude outlook emotion category",
    "prediction verdict conclusion judgement judgment result decision rating response correct",
    "right pick guess vote 情感 情绪 感情 Stimmung sentimiento",
)
IS = words(
    "is was are be being equals = est ist es è é e är er on to это هي هو है 是 为 為 は 은 는",
    "คือ",
)
SUBJECT = words("it that this here c")
CLAUSE = words("it this there they he she we i you")  # a clause of its own begins
SAY = words(
    "choose choosing chose pick picked picking select selected selecting go going opt vote say",
    "guess believe think prefer favor favour conclude lean leaning settle bet",
)
FIRST = words("i we me us my our let please")  # who answers, not `many choose B`
WOULD = words("would will should could must can may might do am are have had to going want")
PARTLY = words("partially partly nearly almost")
ALTHOUGH = words("although though")
CONCEDED = ALTHOUGH | words("while whereas")  # at the head of a line
SO = words("so thus therefore hence overall conclusion ultimately finally → ⇒ > 因此 所以")
ADVERB = words(
    "very quite rather more most so too somewhat a an the just indeed number given by as to that",
    "actually still la le die der das el other one only with for on i me",
)  # may stand between `is` and the answer
RIGHT = words(
    "correct right true best accurate valid appropriate richtig korrekt correcte correcta",
    "correcto corretta corretto correta 正确 正確",
)
VERB = words(
    "is are was were can could would should must may might will wo do does did has have seem",
    "seems look looks appear appears sound sounds make makes fits matches holds 是 ist est es è",
    "é",
)
CORRECTION = words(
    "wait actually correction sorry mean meant scratch oops mistake thought thoughts"
)

NOT = words(
    "not never neither nor nothing none hardly barely scarcely less without except excluding",
    "unlike other than instead far away anything opposite doubt doubtful if whether unless nicht",
    "kein keine pas non não не nie inte niet ikke değil 不是 fail fails failed lack lacks",
    "lacking avoid 不 没有",
)
HEDGE = words("probably possibly perhaps likely")  # between `yes` or `no` and `maybe`
NEVER = words("not never nicht fails")
LESS = {("less", "likely"), ("least", "likely"), ("no", "sense"), ("no", "good")}
SURE = {("none", "other"), ("not", "only"), ("not", "just"), ("not", "merely")}
REFUSE = ("exclud", "eliminat", "reject", "dismiss", "discard", "contradict")  # how words begin
OUT = ("rul", "cross")  # ... before `out`
WRONG = words(
    "incorrect wrong false untrue invalid inaccurate impossible unlikely implausible irrelevant",
    "distractor distractors trap misleading mistaken tempting herring inconsistent incompatible",
    "nonsense falsch faux fausse incorrecta incorrecto sbagliata errada fout out ✗ ✘ ❌ ✖ 错误",
    "错",
)
BUT = words("but rather instead sondern sino bensì maar mas mais 而 而是")
BREAK = BUT | words(
    "but so thus therefore hence because since and instead while whereas however although though",
    "which that then",
)  # another thought begins
JOIN = words(
    "and or nor to through vs versus as well und oder et ou y e o или и ve veya lub en och eller",
    "atau 和 或 与 及 と",
)


def adverb(word: str) -> bool:
    return word in ADVERB or (word.endswith("ly") and word not in NOT)


# What may stand directly before or after a letter that is one of an option ...
BEFORE_LETTER = words(
    "is was be are been it only then than why if whether of between either both neither nor not",
    "and or but so thus therefore hence to out from except unlike that because as just means",
    "would with for on toward towards see also like vs versus through say go going eliminate",
    "eliminates eliminated exclude excludes excluded excluding reject rejects rejected think",
    "ruled wrong incorrect false true statement item marked labeled labelled actually wait am",
    "yes y und oder et ou la le lean rather instead leaves leaving veya или sondern sino",
)
AFTER_LETTER = words(
    "is was were are because since as for and or nor but to through vs versus due given seems",
    "appears looks sounds fits matches can could should would must may might will has have does",
    "do did at here only both too also so if which that rather instead over it with in not from",
    "makes holds says states describes represents explains gives follows than y und oder et ou",
    "nicht ist est es remains veya или şıkkı şıkkıdır seçeneği seçeneğidir です だ 입니다 이다",
    "项 項 正确 是 と 和 或 与 及 है wo fails contradicts i",
)
# ... and directly after a label that describes what is asked about, and not `positive earnings`.
AFTER_LABEL = words(
    "and or nor but to for because since as with without in on at of from by about overall",
    "toward towards than rather instead not due given that which this if while when though",
    "although however so is was are be may might can could would will sentiment tone news",
    "statement sentence tweet text headline article message feeling feelings view impact effect",
    "light note development developments sign signal one answer label class category response",
    "review opinion attitude mood connotation emotion language content information update",
    "announcement report post comment reaction side way thing things indicator indicators",
    "polarity rating score here there i it the a an has have seems outlook vs versus through",
    "です だ と だと",
)
BEFORE_LEADING = (
    words("is be was say answered a and or to either neither nor not but rather than") | ANSWER | IS
)
AFTER_NO = words(
    "but nor rather than it this that there the they he she we because since as i and or but is"
)
SPECIES = words(
    "coli difficile albicans fumigatus cereus anthracis burgdorferi fragilis perfringens",
    "botulinum tetani trachomatis diphtheriae baumannii pertussis henselae neoformans immitis",
    "elegans faecalis gondii histolytica lumbricoides cepacia jejuni psittaci granulosus",
    "medinensis",
)  # C. difficile
ORDINAL = {
    "first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4,
    "1st": 0, "2nd": 1, "3rd": 2, "4th": 3, "5th": 4, "last": -1,
}  # fmt: skip
# Usual labels in other languages.
SAME = {
    "yes": words("ja oui sí sì sim evet tak да نعم हाँ はい 是的 对 예 네"),
    "no": words("nein non não nej nee nie hayır нет لا नहीं いいえ 否 不是 아니요 아니오"),
    "maybe": words(
        "vielleicht peut-être quizás quizá forse talvez misschien kanske belki może возможно",
        "может ربما शायद 也许 可能 たぶん 아마도 아마",
    ),
    "positive": words(
        "positiv positif positivo positiva positief pozitif pozytywny положительный позитивный",
        "إيجابي सकारात्मक 积极 正面 ポジティブ 긍정적 긍정",
    ),
    "negative": words(
        "negativ négatif negativo negativa negatief negatif negatywny отрицательный негативный",
        "سلبي नकारात्मक 消极 负面 ネガティブ 부정적 부정",
    ),
    "neutral": words(
        "neutre neutro neutra neutraal nötr neutralny нейтральный محايد तटस्थ 中性 中立",
        "ニュートラル 중립적 중립",
    ),
}
