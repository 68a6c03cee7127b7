"""The legal domain: statutes and contracts, clause types, holdings, bills with summaries.

What it is: four tasks in the manner of legal benchmarks, in sentences of this project's own.
Where it sits: drawing -> legal -> corpus. Wording tables first, then one maker per task.
What it does NOT know: splits, tokens, other domains. Nothing here is law.

Slots in the tables: {A}, {B} the contract's parties, {n} days or years, {m} an amount, {s} a section, {c} claimant and
{r} respondent of a case.
"""

from __future__ import annotations

from atp.embedded.drawing import (
    COUNTS, MONTHS, STATES, SURNAMES, Draw, Record, Task, article, company, dollars, numbered, sentence,
)  # fmt: skip

# term, definition, forbidden act, document, authority, exempt group, records kept
_REGULATED = (
    ("covered vessel", "a boat that carries {n} or more passengers for hire", "operate a covered vessel", "permit", "Harbor Commission", "a vessel owned by a school", "each voyage"),
    ("food stall", "a stand or cart of less than {n} square yards from which food is sold", "sell food from a food stall", "license", "Health Department", "a stall at a charity event", "each supplier"),
    ("hazardous cargo", "a load of more than {n} barrels of fuel or acid", "transport hazardous cargo", "certificate", "Transport Board", "a farmer who moves fuel for farm use", "each delivery"),
    ("home lender", "a person who makes more than {n} loans in a year on the security of a dwelling", "act as a home lender", "license", "Banking Commissioner", "a credit union", "each loan"),
    ("public well", "a well that supplies water to at least {n} households", "drill a public well", "permit", "Water Authority", "a well used only for livestock", "each water test"),
    ("private school", "a school of {n} or more pupils that is not run by a district", "open a private school", "certificate", "Board of Education", "a school run by a church", "attendance"),
    ("waste site", "land on which more than {n} tons of waste are kept", "operate a waste site", "permit", "Environmental Agency", "a site that holds only compost", "each load received"),
    ("crane operator", "a person who lifts loads of more than {n} tons for pay", "work as a crane operator", "license", "Labor Department", "a person in training", "each inspection"),
    ("rental agent", "a person who lets {n} or more dwellings for others", "act as a rental agent", "license", "Housing Commission", "an owner who lets one dwelling", "each deposit"),
    ("pest product", "a substance sold in packs of {n} pounds or more to kill insects", "apply a pest product", "certificate", "Agriculture Department", "a product used indoors", "each application"),
    ("data broker", "a business that sells the personal information of more than {n} thousand people", "act as a data broker", "registration", "Attorney General", "a newspaper", "each sale"),
    ("elder home", "a house in which {n} or more older persons receive daily care", "operate an elder home", "license", "Health Department", "care given by a relative", "each resident"),
    ("timber land", "a tract of more than {n} acres on which trees are grown for sale", "cut trees on timber land", "permit", "Forest Service", "the removal of dead trees", "each harvest"),
    ("solar farm", "a site with panels that produce more than {n} megawatts", "build a solar farm", "permit", "Energy Board", "panels on a roof", "power produced"),
    ("public auction", "a sale at which more than {n} lots are offered to bidders", "conduct a public auction", "license", "Trade Commission", "a sale ordered by a court", "each bid"),
    ("guard dog", "a dog of more than {n} pounds kept to protect premises", "keep a guard dog", "registration", "Animal Control Board", "a dog used by the police", "each vaccination"),
)  # fmt: skip

_CONTRACTS = (
    ("Lease", "Landlord", "Tenant", "premises", "rent"),
    ("Supply Agreement", "Supplier", "Buyer", "goods", "the price"),
    ("License Agreement", "Licensor", "Licensee", "programs", "the license fee"),
    ("Service Agreement", "Consultant", "Client", "services", "the service fee"),
    ("Building Contract", "Contractor", "Owner", "works", "the contract sum"),
    ("Distribution Agreement", "Company", "Distributor", "products", "the commission"),
    ("Storage Agreement", "Warehouse", "Customer", "stored goods", "the storage charge"),
    ("Transport Agreement", "Carrier", "Shipper", "parcels", "the freight charge"),
)

# Each type's sentences borrow the words of the other types, so that single words do not give the type away.
_CLAUSES = {
    "Termination": (
        "either party may end this Agreement by giving the other {n} days' written notice",
        "if {B} does not pay an invoice within {n} days after it is due, {A} may bring this Agreement to an end at once",
        "{B} may cancel this Agreement if {A} breaches a warranty and does not cure the breach within {n} days",
        "this Agreement comes to an end on the day that the insurance of {A} lapses",
        "on an assignment made without consent, {A} may cancel this Agreement with effect from the date of its notice",
        "{B} may withdraw from this Agreement without cause once {n} days have passed since the last delivery",
        "if confidential information is disclosed in breach of this Agreement, {A} may end it without notice",
    ),
    "Confidentiality": (
        "each party shall keep secret all information that it receives from the other and that is marked as private",
        "{A} may not disclose the price or the payment terms of this Agreement to any third person",
        "for {n} days after this Agreement ends, {B} shall not reveal what it has learned about the {x} of {A}",
        "{A} may share the records of {B} only with its insurers and lawyers, who must keep them secret",
        "information that a court orders a party to produce may be disclosed, but only to that extent",
        "an assignee of this Agreement is bound to keep private every document that {B} has received",
        "on request {B} shall return or destroy all papers that hold the trade secrets of {A}",
    ),
    "Indemnity": (
        "{A} shall hold {B} harmless from all claims of third persons that arise from the {x}",
        "{B} shall defend {A} against any suit brought by others because of its use of the {x}, and pay any award",
        "if a third person sues {B} over a breach of warranty by {A}, {A} shall bear the costs of the defense",
        "{A} shall make good to {B} every fine, cost, and fee that a public authority demands from it",
        "{B} shall repay to {A} any loss that it suffers because an employee of {B} disclosed secret information",
        "each party shall reimburse the other for claims by the injured that insurance does not meet",
        "{A} shall protect {B} from the claims of its carriers and subcontractors for unpaid wages",
    ),
    "Liability": (
        "in no event shall {A} owe {B} more than {m} in total, whatever the cause of the claim",
        "neither party is responsible to the other for lost profits or other indirect loss",
        "the damages that {B} may claim for late delivery are capped at {m}",
        "the sum that {A} may have to pay for a breach of warranty shall not exceed the price paid in the last {n} days",
        "{A} is not answerable for a loss that {B} could have insured, even if {A} was careless",
        "all claims for damages against {A} are barred unless {B} makes them within {n} days after the loss",
        "the limit of {m} applies to every claim under this Agreement, except for the disclosure of secrets",
    ),
    "Warranty": (
        "{A} promises that the {x} will be free of defects for {n} days after delivery",
        "{A} represents that it has good title to the {x} and the right to assign them",
        "if the {x} do not conform to this promise, {A} shall repair or replace them without charge",
        "{A} guarantees that the {x} will perform as the written description states",
        "the {x} are provided as they are, and {A} makes no promise about their quality or fitness",
        "{B} confirms that it has the power to enter into this Agreement and to pay the sums due under it",
        "{A} assures {B} that the {x} do not infringe the rights of third persons and that no suit is pending",
    ),
    "Payment": (
        "{B} shall pay {p} of {m} within {n} days after receipt of an invoice",
        "a sum that is not paid when due bears interest at {q} percent a year",
        "{B} shall pay {m} on signing and the balance within {n} days after delivery",
        "{A} may raise {p} once a year by up to {q} percent on {n} days' notice",
        "{B} may not set off claims for damages against {p} unless a court has confirmed them",
        "the premium for the insurance is included in {p}, and no further charge may be made",
        "when this Agreement ends, {A} shall refund within {n} days what {B} has paid in advance",
    ),
    "Assignment": (
        "neither party may transfer its rights under this Agreement without the written consent of the other",
        "{A} may transfer its right to {p} to a bank on {n} days' notice",
        "this Agreement binds and benefits the successors of both parties",
        "{B} may pass this Agreement to an affiliate that takes over all of its duties, also those of secrecy",
        "a change in the control of {B} counts as a transfer and needs the consent of {A}",
        "{A} may not delegate the delivery of the {x} to others, but may hand over the sending of invoices",
        "an attempt to transfer this Agreement or a claim for damages without consent has no effect",
    ),
    "Delivery": (
        "{A} shall hand over the {x} at the place that {B} names within {n} days after the order",
        "the risk of loss passes to {B} when the {x} are handed to the first carrier",
        "{A} shall pack and mark the {x} and bear the cost of bringing them to {B}",
        "if {A} is late by more than {n} days, {B} may refuse to accept the {x} that are still outstanding",
        "{B} shall inspect the {x} within {n} days after they arrive and report any defect",
        "the {x} are made available in parts, and each part is invoiced when it has arrived",
        "{A} shall tell {B} the day of arrival at least {n} days before and keep proof of receipt",
    ),
    "Insurance": (
        "{A} shall carry coverage of at least {m} for each accident during the term of this Agreement",
        "{B} shall name {A} as an additional insured and send it a certificate each year",
        "{A} shall keep a policy against fire and theft in force until the {x} are delivered",
        "a policy required here may not be canceled without {n} days' notice to {B}",
        "{B} shall pay the premiums when due and show {A} proof of cover on request",
        "the coverage of {A} must include the claims of third persons up to {m}",
        "if {A} lets its policy lapse, {B} may buy cover and charge the premium to {A}",
    ),
    "Disputes": (
        "the courts of {S} shall hear every case that arises from this Agreement",
        "this Agreement is governed by the law of {S}",
        "a claim for unpaid invoices or damages shall be decided by one arbitrator sitting in {S}",
        "the parties shall first try to settle their differences by mediation for {n} days",
        "both parties waive a trial by jury in any suit about the {x}",
        "the side that loses in court shall pay the legal fees of the side that wins",
        "the arbitrators may not award more than {m}, and their decision is final and secret",
    ),
}  # fmt: skip
CLAUSE_TYPES = tuple(_CLAUSES)
_LEADS = (
    "subject to Section {s}, ", "notwithstanding any payment then due, ", "without limiting the indemnity in Section {s}, ",
    "whether or not this Agreement has been terminated, ", "except as the insurance under Section {s} provides, ",
    "in addition to the warranties in Section {s}, ", "despite the duty of secrecy in Section {s}, ",
    "even if the {x} have been delivered, ", "unless Section {s} states otherwise, ",
    "without regard to any assignment, ",
)  # fmt: skip
_TAILS = (
    "This Section survives the end of this Agreement.", "Any notice must be sent as Section {s} provides.",
    "Amounts due under this Section are payable with the next invoice.", "No assignment changes this Section.",
    "Nothing here limits a warranty given in Section {s}.", "Insurance proceeds do not reduce this duty.",
    "A dispute about this Section does not suspend delivery.", "The limit of damages in Section {s} applies here.",
    "The terms of this Section are confidential.",
)  # fmt: skip

_ROLES = (
    ("tenant", "landlord"), ("worker", "employer"), ("patient", "hospital"), ("buyer", "seller"), ("insured", "insurer"),
    ("shipper", "carrier"), ("borrower", "lender"), ("student", "college"), ("author", "publisher"),
    ("passenger", "airline"), ("franchisee", "franchisor"), ("investor", "broker"), ("guest", "hotel"), ("farmer", "mill"),
)  # fmt: skip
# doctrine, then facts that stand for it
_DOCTRINES = (
    ("the rule of promissory estoppel", "the {c} had relied on an oral promise made by the {r}", "the {r} made a promise on which the {c} acted"),
    ("the statute of frauds", "the agreement between the {c} and the {r} was never put in writing", "there was no signed writing"),
    ("the duty of care", "the {r} had been careless toward the {c}", "the {r} failed to act as a prudent person would"),
    ("the doctrine of waiver", "the {r} had accepted late performance many times", "the {r} had often let the terms slide"),
    ("the implied warranty", "the thing supplied by the {r} was not fit for its purpose", "what the {c} received did not work"),
    ("the law of fraud", "the {r} had lied to the {c}", "the {r} made a false statement which the {c} believed"),
    ("the doctrine of mistake", "both sides were wrong about a basic fact", "the {c} and the {r} shared a false belief"),
    ("the law of agency", "a manager had acted in the name of the {r}", "the {r} had sent an agent to deal with the {c}"),
    ("the rule of strict liability", "the {r} carried on a dangerous activity", "the harm came from an explosive kept by the {r}"),
    ("the law of defamation", "the {r} had published an untrue report about the {c}", "the {r} wrote a letter that hurt the good name of the {c}"),
    ("the privacy statute", "the {r} had released the personal files of the {c}", "the {r} opened the mail of the {c}"),
    ("the equal treatment act", "the {r} had treated the {c} worse because of age", "the {r} applied one rule to women and another to men"),
    ("the doctrine of duress", "the {c} had signed under a threat", "the {r} forced the {c} to sign"),
    ("the law of restitution", "the {c} had paid the {r} twice by error", "the {r} kept money that belonged to the {c}"),
)  # fmt: skip
# condition as found in the facts, and as stated in the holding
_CONDITIONS = (
    ("written notice had been given", "written notice was given"), ("no written notice was ever given", "no written notice was given"),
    ("the {c} had signed a release", "a release was signed"), ("the harm could have been foreseen", "the harm was foreseeable"),
    ("nobody could have foreseen the harm", "the harm was not foreseeable"), ("the claim was filed {n} years late", "the claim was filed late"),
    ("the suit was filed in good time", "the claim was filed in time"), ("the {c} was partly at fault", "the claimant was partly at fault"),
    ("the {r} knew of the danger", "the danger was known"), ("the {c} suffered no loss", "no loss was proved"),
)  # fmt: skip
_WON = (
    "the court entered judgment for the {c}", "the order dismissing the claim of the {c} was reversed",
    "the verdict for the {c} was upheld on appeal", "the appeals court found for the {c}", "the court made the {r} pay",
)  # fmt: skip
_LOST = (
    "the court dismissed the claim of the {c}", "the judgment in favor of the {r} was affirmed",
    "the award to the {c} was set aside on appeal", "the appeals court found for the {r}", "the court sent the {c} away with nothing",
)  # fmt: skip
_WON_FORMS = (
    "{a} {c} may recover from {b} {r} under {d} where {w}.",
    "{b} {r} is liable to {a} {c} under {d} where {w}.",
)
_LOST_FORMS = (
    "{a} {c} may not recover from {b} {r} under {d} where {w}.",
    "{b} {r} is not liable to {a} {c} under {d} where {w}.",
)

_AGENCIES = (
    ("Secretary of Agriculture", "Department of Agriculture"), ("Secretary of Education", "Department of Education"),
    ("Secretary of Energy", "Department of Energy"), ("Secretary of Labor", "Department of Labor"),
    ("Secretary of Transportation", "Department of Transportation"), ("Secretary of Commerce", "Department of Commerce"),
    ("Secretary of the Interior", "Department of the Interior"), ("Secretary of Defense", "Department of Defense"),
    ("Attorney General", "Department of Justice"), ("Secretary of Veterans Affairs", "Department of Veterans Affairs"),
)  # fmt: skip
_MEASURES = (
    ("Clean Rivers", "states", "remove lead from drinking water"), ("Rural Roads", "counties", "repair bridges and rural roads"),
    ("Safe Schools", "school districts", "improve the safety of school buildings"), ("Small Farms", "family farmers", "save water and soil"),
    ("Job Training", "community colleges", "train workers for skilled trades"), ("Coastal Shield", "coastal towns", "build walls against floods"),
    ("Home Energy", "low-income families", "insulate their homes"), ("Village Broadband", "small towns", "connect homes to the internet"),
    ("Forest Renewal", "tribal governments", "replant burned forests"), ("Night Bus", "cities", "run buses at night"),
    ("Veterans Housing", "nonprofit groups", "house homeless veterans"), ("Clear Air", "power plants", "reduce smoke and dust"),
    ("Early Reading", "public libraries", "teach young children to read"), ("Fair Courts", "state courts", "provide lawyers for the poor"),
)  # fmt: skip
_FINDINGS = (
    "the need to {p} has grown in every region", "few {g} can afford to {p}", "earlier programs for {g} ended in {y}",
    "a study made in {y} found that it pays to {p}",
)  # fmt: skip


def _statute(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    return _contract(draw) if number % 2 else _code_section(draw)


def _code_section(draw: Draw) -> tuple[Record, tuple[str, ...]]:
    term, meaning, act, document, authority, exempt, kept = draw.pick(_REGULATED)
    state, chapter, section = draw.pick(STATES), draw.whole(11, 89), draw.whole(101, 140)
    rest = [
        f"An applicant for {article(document)} must file a statement with the {authority} and pay a fee of {dollars(draw, 50, 900, 50)}.",
        f"The {authority} may suspend or revoke {article(document)} after notice and a hearing if the holder has violated subsection (b).",
        f"A person who violates subsection (b) is liable for a civil penalty of not more than {dollars(draw, 500, 9000, 500)} for each {draw.pick(('day', 'violation'))}.",
        f"Subsection (b) does not apply to {exempt}.",
        f"The holder of {article(document)} shall keep a record of {kept} for {draw.whole(2, 9)} years and show it to the {authority} on request.",
        f"The {authority} shall adopt rules to carry out this section and section {chapter}.{section + draw.whole(1, 9)}.",
        f"This section takes effect on {draw.pick(MONTHS)} 1, {draw.whole(2021, 2039)}.",
        f"A person harmed by a violation of this section may bring a civil action within {draw.whole(2, 6)} years.",
    ]  # fmt: skip
    number = draw.pick(("5", "10", "20", "50"))
    parts = [
        f'In this section, "{term}" means {meaning.format(n=number)}.',
        f"A person may not {act} in {state} without {article(document)} issued by the {authority}.",
        *draw.some(rest, draw.whole(1, 3)),
    ]
    lettered = "\n".join(f"({'abcdef'[i]}) {part}" for i, part in enumerate(parts))
    title = draw.pick((sentence(document) + " required", sentence(term), "Regulation of " + term))
    return {"text": f"{state} Code § {chapter}.{section}. {title}.\n{lettered}"}, (term, state)


def _contract(draw: Draw) -> tuple[Record, tuple[str, ...]]:
    title, first, second, subject, _ = contract = draw.pick(_CONTRACTS)
    kinds = draw.some(CLAUSE_TYPES, draw.whole(2, 4))
    start, state = draw.whole(2, 14), draw.pick(STATES)
    lines = [
        f"{start}.{i + 1} {kind}. {_filled(draw.pick(_CLAUSES[kind]), draw, contract)}." for i, kind in enumerate(kinds)
    ]
    opening = draw.pick((
        f'{title} between {company(draw)} (the "{first}") and {company(draw)} (the "{second}"), made in {state}.',
        f"This {title} is made in {state} by the {first} and the {second}.",
        f"{title}. In this Agreement, the {first} provides the {subject} to the {second} in {state}.",
    ))  # fmt: skip
    return {"text": "\n".join((opening, *lines))}, (title, state)


def _filled(text: str, draw: Draw, contract: tuple[str, str, str, str, str]) -> str:
    """Fill a clause's slots and begin it with an upper-case letter."""
    _, first, second, subject, price = contract
    slots = {"A": f"the {first}", "B": f"the {second}", "x": subject, "p": price, "S": draw.pick(STATES)}
    figures = {"n": draw.pick((10, 14, 15, 20, 30, 45, 60, 90)), "q": draw.whole(2, 9), "s": draw.whole(2, 19)}
    return sentence(text.format(**slots, **figures, m=dollars(draw, 5000, 95000, 5000)))


def _clause(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    label = number % len(CLAUSE_TYPES)
    contract = draw.pick(_CONTRACTS)
    core = draw.pick(_CLAUSES[CLAUSE_TYPES[label]])
    lead = draw.pick(_LEADS) if draw.chance(0.5) else ""
    text = _filled(lead + core, draw, contract) + "."
    if draw.chance(0.5):
        text += " " + _filled(draw.pick(_TAILS), draw, contract)
    prompt = f"{contract[0]}, Section {draw.whole(2, 19)}: {text}\nClause type:\n"
    return {"prompt": prompt, "choices": list(CLAUSE_TYPES), "label": label}, (contract[0], core, lead)


def _holding(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    parties = draw.pick(_ROLES)
    doctrine, condition = draw.pick(_DOCTRINES), draw.pick(_CONDITIONS)
    won = number % 2 == 0
    claimant, respondent = parties
    one, two = draw.some(SURNAMES, 2)
    facts = [f"The {claimant} argued that {draw.pick(doctrine[1:])}", f"The court found that {condition[0]}"]
    if draw.chance(0.5):
        facts[0] = f"The {claimant} relied on {doctrine[0]}"
    end = draw.pick(_WON if won else _LOST)
    opening = draw.pick((
        f"{sentence(article(claimant))} named {one} sued {article(respondent)}.",
        f"{one}, {article(claimant)}, brought a suit against {article(respondent)}.",
        f"The case was brought by {one}, {article(claimant)}, against {article(respondent)} in {draw.pick(STATES)}.",
    ))  # fmt: skip
    told = f"{opening} {facts[0]}. {facts[1]}. {sentence(end)}.".format(c=claimant, r=respondent, n=draw.pick(COUNTS))
    prompt = f"{one} v. {two} ({draw.whole(1961, 2024)}). {told}\nHolding:\n"
    choices = _candidates(draw, parties, doctrine[0], condition[1], won)
    label = (number // 2) % len(choices)
    return {"prompt": prompt, "choices": numbered(choices, label, draw), "label": label}, (claimant, doctrine[0])


def _candidates(draw: Draw, parties: tuple[str, str], doctrine: str, condition: str, won: bool) -> list[str]:
    """Return the right holding and four that differ from it in one or two slots."""
    doctrines, conditions = [d[0] for d in _DOCTRINES], [c[1] for c in _CONDITIONS]
    form = draw.below(len(_WON_FORMS))
    strangers = draw.other(_ROLES, parties)
    wrong_doctrine, wrong_condition = draw.other(doctrines, doctrine), draw.other(conditions, condition)
    swaps = [
        (strangers, doctrine, condition, won),
        (parties[::-1], doctrine, condition, won),
        (parties, doctrine, wrong_condition, won),
        (parties, wrong_doctrine, condition, not won),
        (parties, doctrine, wrong_condition, not won),
        (parties, wrong_doctrine, wrong_condition, won),
    ]
    slots = [(parties, doctrine, condition, won), (parties, doctrine, condition, not won)]
    slots += [(parties, wrong_doctrine, condition, won), *draw.some(swaps, 2)]
    found = []
    for (claimant, respondent), under, where, recovers in slots:
        a, b = article(claimant).split()[0], article(respondent).split()[0]
        text = (_WON_FORMS if recovers else _LOST_FORMS)[form]
        found.append(sentence(text.format(a=a, b=b, c=claimant, r=respondent, d=under, w=where)))
    return found


def _bill(draw: Draw, number: int) -> tuple[Record, tuple[str, ...]]:
    (officer, department), (name, receivers, purpose) = draw.pick(_AGENCIES), draw.pick(_MEASURES)
    year, first = draw.whole(2021, 2039), draw.whole(2, 95)
    last, amount = year + draw.whole(2, 9), f"${first} million"
    title = f"{name} Act of {year}"
    consulted = draw.other(_AGENCIES, (officer, department))[0]
    finding = draw.pick(_FINDINGS).format(p=purpose, g=receivers, y=year - draw.whole(2, 15))
    body = [f"This Act may be cited as the {title}."]
    if draw.chance(0.5):
        body.append(f"Congress finds that {finding}.")
    body.append(f"The {officer} shall make grants to {receivers} to {purpose}.")
    extras = (
        f"In making grants, the {officer} shall consult the {consulted}.",
        f"Not later than {draw.whole(2, 9) * 30} days after a grant is made, the {officer} shall report to Congress.",
        f"A grant may not exceed {dollars(draw, 100_000, 900_000, 100_000)}, and {receivers} shall pay {draw.pick((10, 20, 25, 30))} percent of the cost.",
    )  # fmt: skip
    body += draw.some(extras, draw.whole(0, 1))
    body.append(f"There are authorized to be appropriated ${first},000,000 for each year through {last}.")
    lines = "\n".join(f"SEC. {i + 1}. {text}" for i, text in enumerate(body))
    prompt = f"{'H.R.' if number % 2 else 'S.'} {draw.whole(101, 990)}. A BILL to {purpose}.\n{lines}\nSummary:\n"
    summary = (
        f"{title}: Directs the {department} to make grants to {receivers} to {purpose}. "
        f"Authorizes {amount} a year through {last}."
    )
    return {"prompt": prompt, "completion": summary}, (department, name)


TASKS = {
    "statute": Task(2, _statute),
    "clause": Task(3, _clause),
    "holding": Task(3, _holding),
    "bill": Task(2, _bill),
}
