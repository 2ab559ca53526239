"""The words that the prompt reader knows, by what they do to a number or to a noun. Imports no torch."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TO_TWENTY = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
ARTICLES = _words("a an another")
NEGATIONS = _words("no without")
DENIALS = _words(
    "not never neither cannot none nobody nothing nowhere except instead excluding avoid avoiding omit omitting "
    "remove removing sans lacking lacks devoid minus hardly barely scarcely"
)
# "a dog in place of two cats", "anything but a dog"
NOT_OF = _words("place lieu absence lack instead free empty short")
ALL_BUT = _words("anything everything nothing all any none")
# "two missing dogs", "two dogs are missing".
ABSENT = _words("missing absent invisible imaginary nonexistent removed gone vanished")
DEFINITE = _words("the this that these those his her its their my your our")
PER_ITEM = _words("each every per apiece")
QUANTITIES = PER_ITEM | _words(
    "thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen couple trio pair half "
    "quarter first second third fourth fifth sixth seventh eighth ninth tenth several few many some most all both "
    "more less fewer lot"
)
# What a number may count instead of the noun: "two year old dogs".
UNITS = _words("year month week day inch foot feet meter metre door legged headed wheeled")
# Words that end a noun phrase. After those in `LEADS` a number is exact; after others it may not be ("over ten dogs").
LEADS = DEFINITE | _words(
    "and of with in on at near by beside behind between from into while is are was were has have who which "
    "against across along through inside outside among"
)
STOPS = LEADS | _words("for if unless over under above below around to or nor but as like than")
ARTICLE_HEDGES = _words("half than like as many almost nearly or nor twice thrice double triple")
# "a minimum of three dogs", "the rest of five dogs", but "a photo of three dogs".
PARTS = _words(
    "minimum maximum average excess upward upwards third quarter half fraction majority minority part portion "
    "share percent percentage rest remainder most some any each one either neither none out multiple choice mean "
    "median"
)
# "three dogs at most", "two dogs and a half", "five dogs maximum", "nine cats out of ten".
AFTER_HEDGES = tuple(
    hedge.split()
    for hedge in (
        *("at most", "at least", "or more", "or fewer", "or less", "or so", "or thereabouts", "and a half", "and half"),
        *("and counting", "and more", "and a few", "and several", "and many", "and another", "and others"),
        *("maximum", "minimum", "max", "min", "tops", "plus", "times", "twice", "thrice", "approximately", "roughly"),
    )
)
OUT_OF = _words("of in from")
# Words that stand for a noun before: "a red apple and two green ones", "a dog and two others".
PRONOUNS = _words("ones others")
# "two sleeping dogs, a third one awake", "a dog and two more"
ONE_MORE = _words("another second third fourth fifth sixth seventh eighth ninth tenth more")
COORDINATIONS = _words("and or & / ,")
JOINS = _words("and or to of by x \u00d7 * - \u2013 \u2014 / ,")
# Lead-ins that a number may have beside these: "exactly two dogs", "a fox chases two dogs", but "minus two dogs".
ALSO_LEADS = _words(
    "only exactly just me draw paint sketch show generate create depict render imagine "
    ", . ; : ! ? ( ) \" ' - \u2013 \u2014"
)
NO_LEADS = _words("including minus times perhaps")
# What follows may be text to be written: "a sign that says no dogs". Text in quotation marks is refused as well.
TEXT = _words(
    "says saying spells spelling words word text lettering inscription titled entitled captioned labeled labelled"
)
# Other words after a noun that the noun does not describe.
AFTER = _words(
    "asleep awake alone outdoors indoors outside inside there here together up down next wearing made sat stood "
    "lay ran slept ate held looking onto off after before during toward towards where when nearby ahead away "
    "apart around upright beneath underneath within without fast quickly home too also anywhere everywhere only "
    "each facing left right it them him itself himself herself themselves"
)
NOUNS_IN_ING = _words("painting drawing building parking crossing clothing racing ceiling string spring feeding")
# Nouns that a class name describes: "a bird bath", "a car park". Other words may be about the class: "a dog curious".
HEADS = _words(
    "bath park lot house home bowl dish feeder station stop shop store shelter tree orchard grove farm field "
    "pasture barn stable ranch market stand stall box crate basket bag case cover rack shelf holder table counter "
    "cake pie juice soup salad sauce bread pudding peel skin slice tire tires wheel wheels door window windows "
    "seat seats saddle handle bell race track ride racing show park wash repair dealership garage port harbor ramp "
    "bridge toy toys food bed collar leash tag trainer walker rider driver owner lover player conductor pilot "
    "crossing sign signs light lights rug skin fur statue statues sculpture sculptures painting paintings drawing "
    "drawings illustration illustrations figurine figurines mask costume print mat festival cabinet museum factory "
    "school club parade pattern logo sticker poster photo photograph picture portrait tower room carriage cart "
    "trailer pad cable lift road lane path trail walk tracks ticket tickets bone bones nest cage coop kennel "
    "litter den cave tunnel"
)
ADJECTIVES = _words(
    "black white red blue green yellow orange brown grey gray purple pink golden silver gold tan beige dark light "
    "bright big small large little tiny huge tall short long old young new male female striped spotted fluffy "
    "adult baby wild wooden metal plastic fat thin happy sad sleepy dirty clean open closed"
)
PAIRED = _words(
    "skis scissors glasses sunglasses goggles binoculars pliers tweezers tongs headphones trousers pants jeans shorts"
)
