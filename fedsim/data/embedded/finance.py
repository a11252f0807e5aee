"""A small finance news sentiment set, written for this project, for use without a network.

Sentences come from patterns with slots; held-out patterns and companies do not occur in training.
A filler depends on the split, the pattern index and the copy index but not on the label, so that
companies and amounts say nothing about the class. Of the slot pairs lo/hi, plo/phi and clo/chi the
first is the lower number.
"""

from hashlib import blake2b
from itertools import count

INSTRUCTION = (
    "What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}."
)
COPIES = {"train": 14, "test": 5}


def _lines(text: str, mark: str = " | ") -> tuple[str, ...]:
    """Return the entries of a text block, parted by line ends or by the mark."""
    return tuple(text.strip().replace(mark, "\n").splitlines())


COMPANIES: dict[str, tuple[str, ...]] = {
    "train": _lines("""
Halvenor | Brintasca Group | Ostrelund AB | Kivarno Oyj | Teldrasund | Mornivek plc | Aspeltra AG
Corvanilo | Drestamo Group | Elkarvo AB | Fjornata Oyj | Grantulo | Hestrivan plc | Iskelmar AG
Jorvantel | Kelduro Group | Lintorva AB | Maskelund Oyj | Ortalven | Pelvaska plc | Quilstren AG
"""),
    "test": _lines("""
Ambrisolt | Belkortan Group | Cindervo AB | Dalmestra Oyj | Evartinel | Fostrelko plc | Girvanto AG
Hulmarika | Indresko Group | Juvantor AB | Krestolin Oyj | Lomvarda | Nistelko plc | Skarvemo AG
"""),
}
FILLERS: dict[str, tuple[str, ...]] = {
    line.split(": ")[0]: _lines(line.split(": ")[1], ", ")
    for line in _lines("""
product: forest machines, hospital beds, harbour cranes, smart meters, water pumps, lift motors, \
antenna filters, ski jackets, label printers, heat exchangers, car batteries, dental implants
country: Sweden, Poland, Estonia, Germany, Canada, Brazil, Norway, Austria, Spain, India, Japan
place: Tampere, Gothenburg, Riga, Hamburg, Gdansk, Aarhus, Turin, Lyon, Bergen, Graz, Porto, Ghent
unit: Packaging, Marine, Retail, Software, Medical, Logistics, Energy | q: Q1, Q2, Q3, Q4
bank: Larkhestra Securities, Tobrinfeld Capital, Odelvinge Bank | hour: 9:00, 10:30, 13:00
profit: operating profit, net profit, EBITDA | good: strong, good, great | bad: weak, poor, bad
rose: rose, grew, increased, climbed, went up | fell: fell, declined, decreased, dropped, went down
person: Anna Tostrand, Jari Halmero, Marek Dobrinski, Ingrid Vasholm, Paolo Terlizzo, Helen Marwick
role: chief executive, sales director | day: Monday, Tuesday, Wednesday, Thursday, Friday
period: the first quarter, the second quarter, the third quarter, the first half, January-September
month: January, February, March, April, May, June, August, September, October, November
""")
}
RANGES = {  # slot: lowest number, highest number, decimals
    **{"a": (11, 950, 1), "b": (210, 4900, 2), "c": (4, 99, 2), "n": (41, 950, 0)},
    **{"lo": (12, 480, 1), "plo": (21, 90, 1), "clo": (5, 80, 2), "p": (3, 24, 0)},
    **{"dom": (1, 28, 0), "year": (2010, 2019, 0), "fy": (2021, 2027, 0), "byear": (1921, 1987, 0)},
}

TRAIN_PATTERNS: dict[str, tuple[str, ...]] = {
    "negative": _lines("""
The {profit} of {co} {fell} to EUR {lo} mn in {period} from EUR {hi} mn a year earlier.
Net loss of {co} widened to EUR {hi} mn in {period} from EUR {lo} mn in the same period of {year}.
{co} has lost an order for {product} worth EUR {a} mn after its customer in {country} cancelled it.
{co} cut its guidance for {year} and now expects {profit} of less than EUR {a} mn.
Net sales {fell} from EUR {hi} mn to EUR {lo} mn in {period}, {co} said on {day}.
Costs at the {unit} division {rose} by {p}% in {period}, which weighed on the result of {co}.
The board of {co} proposes lowering the dividend to EUR {clo} per share from EUR {chi}.
{bank} downgraded {co} to sell from hold and lowered its price target to EUR {b}.
The order book of {co} {fell} to EUR {lo} mn at the end of {month} from EUR {hi} mn in {year}.
{co} sank to a pretax loss of EUR {a} mn in {period} from a profit of EUR {lo} mn.
Demand for {product} has weakened in {country}, and {co} is laying off {n} people in {place}.
Due to lower volumes, the operating margin of {unit} at {co} {fell} to {plo}% from {phi}%.
{co} said its savings programme in {place} is late and will cost EUR {a} mn more than planned.
Earnings per share of {co} {fell} to EUR {clo} from EUR {chi}, worse than analysts had estimated.
"{month} was {bad}, and sales of {product} missed our targets," said {person}, {role} of {co}.
A court in {place} ordered {co} to pay EUR {a} mn in damages to {co2}.
{co} was not able to avoid job cuts in {place}: {n} people will have to leave in {month}.
Cash flow from operations weakened from EUR {hi} mn to EUR {lo} mn as customers of {co} paid late.
{co} will shut down its {place} plant for good because {product} no longer sell in {country}.
{co} expects its profitability to deteriorate clearly in {year} as raw material prices climb.
Sales of {product} were down {p}% in {country}, and growth in other markets ended for {co}.
Warranty costs {rose} to EUR {hi} mn from EUR {lo} mn as {co} battled faults in its {product}.
{co} does not see any recovery in {country}; on the contrary, orders {fell} {p}% in {month}.
{co} needs a rights issue of EUR {a} mn to cover its losses, diluting current owners by {p}%.
{tick} just lost its {country} contract, time to get out | Fire destroys {co} warehouse in {place}
Profit at {co} below forecast as {product} sell poorly | {tick} cannot pay its debt, a very bad sign
{tick} breaking support at EUR {b}, closed my long | Fine of EUR {a} mn for late deliveries by {co}
the {tick} {q} numbers are a mess, debt is rising | {co} drops plan for {place} mill, no funding
{co} misses estimates in {q}, trims outlook | {tick} at a new low, {product} not selling
{tick} down {p}% after {bad} {q} report | {co} runs out of parts for {product}
{co} loses the right to sell {product} | {co} shares slump after profit miss
{tick} target slashed by {bank} | {co} to lay off {n} in {place}
"""),
    "neutral": _lines("""
The {profit} of {co} was EUR {a} mn in {period}, unchanged from EUR {a} mn a year earlier.
{co} will publish its interim report for {period} of {year} on {day} morning.
{co} makes {product} and employs {n} people in {country}; its net sales were EUR {a} mn in {year}.
{co} repeated its guidance for {year}: {profit} between EUR {lo} mn and EUR {hi} mn.
The annual general meeting of {co} will be held in {place} in {month}, starting at {hour}.
The {unit} division accounts for {p}% of the net sales of {co}, which were EUR {a} mn in {year}.
The board of {co} proposes an unchanged dividend of EUR {c} per share, EUR {a} mn in all.
{bank} kept its hold rating on {co} and left its price target at EUR {b}.
At the end of {month} the order book of {co} consisted of orders for {product} and spare parts.
{co} has appointed {person} {role} of its {unit} division as of {month}.
{co} will move its head office from {place} to {place2} in {month} {year}.
Of the EUR {hi} mn net sales of {co} in {year}, EUR {lo} mn came from {country}.
The share capital of {co} is EUR {a} mn and is divided into {n} million shares.
Earnings per share of {co} were EUR {c} in {period} and EUR {c} in the same period of {year}.
"Our {product} are made in {place} and sold mainly in {country}," said {person}, {role} of {co}.
The EUR {a} mn bond of {co} matures in {fy} and carries a fixed coupon of {plo}%.
{co} has no plans to change the number of its employees in {place}, which is {n}.
Capital expenditure at {co} was EUR {hi} mn in {period}, of which EUR {lo} mn was for {unit}.
The {place} plant of {co} will be closed for the usual summer holidays in July.
{co} gives a two-year warranty on its {product}, {p}% of which are sold in {country}.
As of {month}, {co} reports its {product} as part of the {unit} division; totals remain the same.
The subscription price of the {year} stock options of {co} is EUR {b} per share until {month}.
The higher number of {co} shares, {n} million, is due to a split and does not affect earnings.
Sales of {co} in {country} were flat at EUR {a} mn, with neither gains nor losses of customers.
{tick} flat around EUR {b}, no news, just watching | {tick} still makes its {product} in {country}
{co} plans {place} visit for investors in {month} | {tick} reports {q} numbers on {day} in {place}
Correction to the {year} report of {co}, page {p} | {co} shows {product} at trade fair in {place}
{person} to speak at {co} meeting in {place} | is the {tick} {q} call in {month} or later?
{co} to hold capital markets day in {month} | {tick} free float is {p}% of {n} million shares
{co} prints new catalogue of {product} | Handbook on {product} updated by {co}
{co} shares little changed in {place} | {tick} CFO at {bank} event on {day}
{tick} target unchanged at {bank} | {co} staff in {place} number {n}
"""),
    "positive": _lines("""
The {profit} of {co} {rose} to EUR {hi} mn in {period} from EUR {lo} mn a year earlier.
Net loss of {co} narrowed to EUR {lo} mn in {period} from EUR {hi} mn in the same period of {year}.
{co} has won an order for {product} worth EUR {a} mn from a customer in {country}.
{co} raised its guidance for {year} and now expects {profit} of more than EUR {a} mn.
Net sales {rose} from EUR {lo} mn to EUR {hi} mn in {period}, {co} said on {day}.
Costs at the {unit} division {fell} by {p}% in {period}, which improved the result of {co}.
The board of {co} proposes raising the dividend to EUR {chi} per share from EUR {clo}.
{bank} upgraded {co} to buy from hold and raised its price target to EUR {b}.
The order book of {co} {rose} to EUR {hi} mn at the end of {month} from EUR {lo} mn in {year}.
{co} swung to a pretax profit of EUR {a} mn in {period} from a loss of EUR {lo} mn.
Demand for {product} has picked up in {country}, and {co} is hiring {n} people in {place}.
On higher volumes, the operating margin of {unit} at {co} {rose} to {phi}% from {plo}%.
{co} said its savings programme in {place} works and will save EUR {a} mn more than planned.
Earnings per share of {co} {rose} to EUR {chi} from EUR {clo}, better than analysts had estimated.
"{month} was {good}, and sales of {product} beat our targets," said {person}, {role} of {co}.
A court in {place} dismissed the claim of {co2} for EUR {a} mn in damages from {co}.
{co} did not have to make job cuts in {place}: all {n} people can stay as orders have recovered.
Cash flow from operations improved from EUR {lo} mn to EUR {hi} mn as customers of {co} paid early.
{co} will reopen its {place} plant because {product} are selling well again in {country}.
{co} expects its profitability to improve clearly in {year} as raw material prices ease.
Sales of {product} were up {p}% in {country}, and the decline in other markets ended for {co}.
Warranty costs {fell} to EUR {lo} mn from EUR {hi} mn as {co} solved the faults in its {product}.
{co} does not see any slowdown in {country}; on the contrary, orders {rose} {p}% in {month}.
{co} uses its strong cash position to buy back shares for EUR {a} mn, {p}% of the total.
{tick} just landed a {country} contract, time to get in | {tick} debt free at last, a very good sign
{tick} breaking out above EUR {b}, adding to my long | {tick} at a new high, {product} selling out
Profit at {co} above forecast as {product} sell well | {co} beats estimates in {q}, lifts outlook
the {tick} {q} numbers are great, debt is falling | Bonus of EUR {a} mn for early deliveries by {co}
Patent victory for {co} in {place} court | {co} finds cheaper parts for {product}
{co} gets funding for its {place} mill | {tick} up {p}% after {good} {q} report
{co} gains the right to sell {product} | {co} shares soar after profit beat
{tick} target raised by {bank} | {co} to hire {n} in {place}
"""),
}

TEST_PATTERNS: dict[str, tuple[str, ...]] = {
    "negative": _lines("""
Price pressure has squeezed {co}: its gross margin was {plo}%, against {phi}% two years before.
{co} withdrew its forecast for {year}, citing poor visibility in {country}.
Red ink keeps spreading at {co}, with a shortfall of EUR {hi} mn after EUR {lo} mn in {year}.
Soaring electricity prices left the {place} mill of {co} with an extra bill of EUR {a} mn.
Shareholders of {co} will go without any payout this spring, for the first time since {year}.
"Buyers are putting off purchases of {product}," {role} {person} of {co} told reporters in {place}.
The credit rating of {co} was cut by one notch to junk, which makes borrowing more expensive.
Investigators in {country} have searched the offices of {co} on suspicion of accounting fraud.
The {place} works of {co} runs at only {p}% of its capacity, and the night shift has been idled.
{co} is recalling {product} in {country} after several users were injured.
Bad debts at {co} swelled in {period}: EUR {hi} mn as against EUR {lo} mn.
{co2} walked away from its takeover bid of EUR {b} a share for {co}.
A strike has brought the {place} factory of {co} to a standstill, and deliveries are {p} days late.
Turnover at {co} contracted in every region, {country} being the weakest with minus {p}%.
The auditors have serious doubts about whether {co} can stay in business after {month}.
Restructuring at {co} drags on, swallowing EUR {a} mn, and the {unit} arm still loses money.
Only half as many {product} left the {place} factory of {co} in {period} as the year before.
Customer churn at {co} worsened from {plo}% in {year} to {phi}% today.
Hackers paralysed the systems of {co} for a week, and none of its {n} outlets could take payments.
Talks on new financing collapsed in {place}, leaving {co} short of EUR {a} mn in cash.
{tick} revenue short of consensus, {unit} bleeding cash | staying away from {tick}, insiders selling
{tick} getting hammered, worst session since {year} | {co} files for creditor protection in {place}
Dumped all my {tick} at EUR {b}, this goes lower | Too expensive: {bank} turns bearish on {co}
{co} worst performer in {place} on {day} | Third profit warning in a year from {co}
sold {tick}, the {unit} story is broken | {co} dumps {unit} arm at a heavy loss
Bookings for {product} slack at {co} | Taxman demands EUR {a} mn from {co}
"""),
    "neutral": _lines("""
Each A share of {co} carries ten votes and each B share one vote; the accounting par is EUR {c}.
{co} stands by its forecast that turnover will land in the range of EUR {lo} mn to EUR {hi} mn.
Copies of the {year} annual accounts of {co} are available from its office in {place}.
The {place} mill of {co} buys its electricity from {co2} for EUR {a} mn under a deal ending in {fy}.
Shareholders of {co} who are on the register on {date} are entitled to vote.
"Most of our buyers are mid-sized firms in {country}," {role} {person} of {co} told reporters.
The credit rating of {co} was affirmed with a stable outlook, {bank} said in a notice.
The {place} works of {co}, which was built in {byear}, turns out {product} in three shifts.
English is the language of the webcast that {co} will broadcast from {place} on {day}.
Founded in {byear}, {co} is a family-controlled manufacturer of {product} with {n} staff.
The stake of {co2} in {co} stands at {p}%, according to the latest ownership list.
The {product} are assembled in {place}, while design and purchasing at {co} are done in {place2}.
Of the EUR {a} mn turnover of {co}, {p}% comes from {country} and the rest from other countries.
{co} declined to comment on rumours about the future of its {unit} arm in {country}.
The {co} stock finished the day where it had begun, at EUR {b} in {place}.
Bookings at {co} came in at EUR {a} mn, no different from last season and just as predicted.
Interest on the EUR {a} mn loan of {co} falls due each {month} until {fy}.
{co} rents the {place} warehouse to {co2} for EUR {a} mn a year until {fy}.
Higher wages and higher prices cancelled each other out, and {co} made EUR {a} mn, as before.
{co} groups its activities into three segments, of which {unit} is run by {person}.
{tick} sideways between EUR {lo} and EUR {hi}, nothing to do | Photo gallery: {product} made by {co}
Middle of the road: {bank} starts at neutral on {co} | {co} changes date of {q} figures to {day}
does {tick} break out {unit} revenue in the filing? | reading the {tick} prospectus, now on page {p}
rereading {tick} notes, {unit} is {p}% of sales | {co} to webcast panel on {product} from {place}
Share register of {co} kept in {place} | {tick} goes ex-dividend on {date} fyi
Tax domicile of {co} is {place} | {co} names {person} auditor
"""),
    "positive": _lines("""
Margins at {co} widened for the third quarter running, to {phi}% against {plo}% two years before.
{co} was awarded a framework deal to supply {place} with {product} for up to EUR {a} mn.
Red ink is drying up at {co}, with a shortfall of just EUR {lo} mn after EUR {hi} mn in {year}.
Cheaper electricity left the {place} mill of {co} with EUR {a} mn in unexpected savings.
Shareholders of {co} can look forward to an extra payout this spring, the first since {year}.
"Buyers are queuing up for our {product}," {role} {person} of {co} told reporters in {place}.
The credit rating of {co} was lifted by one notch, which makes borrowing cheaper.
Investigators in {country} have cleared {co} of all suspicion and ended their probe.
Capacity at the {place} works of {co} is sold out until {fy}, and a night shift has been added.
Users in {country} praise the new {product} of {co}, and the first batch is sold out.
Bad debts at {co} receded in {period}: EUR {lo} mn as against EUR {hi} mn.
{co2} has agreed to pay EUR {b} a share for {co}, a premium of {p}% over the last close.
Fears of a strike proved unfounded, and output at the {place} factory of {co} hit an all-time high.
Turnover at {co} advanced in every region, {country} being the strongest with plus {p}%.
No further impairments are needed at {co}, the auditors concluded, to the relief of investors.
Restructuring has made {co} leaner, freeing EUR {a} mn, and the {unit} arm makes money again.
Twice as many {product} left the {place} factory of {co} in {period} as the year before.
Customer churn at {co} eased from {phi}% in {year} to {plo}% today.
New systems at {co} work without a hitch, and its {n} outlets serve buyers faster than ever.
Investors rushed to fund {co} in {place}, offering twice the EUR {a} mn it had sought.
{tick} revenue ahead of consensus, {unit} gushing cash | bought {tick}, the {unit} story is intact
{co} overtakes {co2} as market leader in {country} | {tick} on fire, best session since {year}
Too cheap to ignore: {bank} turns bullish on {co} | Loaded up on {tick} at EUR {b}, this goes higher
{co} parts with {unit} arm at a fat gain | {co} best performer in {place} on {day}
Bookings for {product} brisk at {co} | happy to own {tick}, insiders buying
Tax windfall of EUR {a} mn for {co} | Best quarter ever for {co}
"""),
}


def _draw(*key: object) -> int:
    """Return a 64-bit number that depends on the key alone."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def _slots(split: str, *key: int) -> dict[str, str]:
    """Return a filler for every slot of one sentence."""

    def pick(slot: str, low: int, high: int) -> int:
        return low + _draw(split, *key, slot) % (high - low + 1)

    out: dict[str, str] = {}
    for slot, pool in {**FILLERS, "co": COMPANIES[split]}.items():
        i, step = pick(slot, 0, len(pool) - 1), pick(slot + "2", 1, len(pool) - 1)
        out[slot], out[slot + "2"] = pool[i], pool[(i + step) % len(pool)]
    for slot, (low, high, digits) in RANGES.items():
        number = pick(slot, low, high)
        out[slot] = f"{number / 10**digits:.{digits}f}"
        if slot.endswith("lo"):
            top = number + 1 + number * pick("rise", 12, 90) // 100
            out[slot[:-2] + "hi"] = f"{top / 10**digits:.{digits}f}"
    out["date"] = f"{out['dom']} {out['month']} {out['year']}"
    out["tick"] = f"${out['co'][:5].upper()}"
    return out


def _sentences(split: str) -> list[tuple[str, str]]:
    """Return (label, sentence) pairs; each round of copies holds every pattern once, shuffled."""
    seen: set[str] = set()
    rows: list[tuple[str, str]] = []
    for copy in range(COPIES[split]):
        drawn = []
        for label, patterns in (TRAIN_PATTERNS if split == "train" else TEST_PATTERNS).items():
            for i, pattern in enumerate(patterns):
                texts = (pattern.format_map(_slots(split, i, copy, n)) for n in count())
                text = next(text for text in texts if text not in seen)
                seen.add(text)
                drawn.append((_draw(split, label, i, copy), label, text))
        rows += [(label, text) for _, label, text in sorted(drawn)]
    return rows


def train() -> list[dict[str, str]]:
    """Return the training rows with the columns of FinGPT/fingpt-sentiment-train."""
    return [{"input": t, "output": y, "instruction": INSTRUCTION} for y, t in _sentences("train")]


def test() -> list[dict[str, object]]:
    """Return the held-out rows with the columns of Financial PhraseBank, labels 0, 1 and 2."""
    order = list(TEST_PATTERNS)
    return [{"sentence": text, "label": order.index(label)} for label, text in _sentences("test")]
