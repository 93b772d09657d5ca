"""Texts for any server: common words in random order, so that no tokenizer is needed to make them.

A short English word is about one token wherever English was trained on; how many it really is the
server's own count says (`client.greet`).
"""

import random

_TEXT = """\
air apple arm art autumn baby back ball bank base bath bear bed bell bird blood board boat body
bone book bottle box boy branch bread bridge brother brush building bus butter button cake camera
camp car card care cat chain chair chance change child church circle city class clock cloth cloud
coat coffee cold color cook corner cotton country cow cream crowd cup current dance daughter day
death desk dinner direction dog door dress drink driver duty ear earth east edge effect egg end
engine evening event eye face fact family farm father feather field fight finger fire fish flag
floor flower fly food foot forest fork friend front fruit game garden gate girl glass glove goat
gold grass ground group hair hand hat head heart heat history hole home horse hospital hour house
ice idea ink iron island job join journey judge jump kettle key kick kind king kiss kitchen knee
knife lake land language law leaf leg letter level library light line lip list lock love machine
man map mark market match meal measure meat meeting metal milk mind mine minute mist money month
moon morning mother mountain mouth music nail name nation neck needle nerve net news night noise
north nose note number nut offer office oil opinion orange order oven page paint paper part party
past peace pen person picture pig pipe place plane plant plate play point pocket position pot
potato powder price print prison process profit pull pump purpose rail rain range rate ray reason
record regret rest reward rhythm rice ring river road rock roof room root rule sail salt sand
scale school science sea seat secretary seed sense shade shake shame sheep shelf ship shirt shock
shoe side sign silk silver sister size skin sky sleep slope smell smile smoke snake snow soap sock
soft son song sort sound soup south space spade spoon spring square stage stamp star start station
steam steel stem step stick stone stop store story street student sugar summer sun table tail talk
taste tax test theory thing thought thread thunder ticket time tin toe tongue tooth top touch town
trade train tree trick trouble turn twist unit value verse view voice wall war wash waste watch
water wave wax way weather week weight wheel wind window wine wing winter wire wish woman wood
wool word work worm wound writing year
"""
WORDS = tuple(_TEXT.split())


def words_of(num_words: int, seed: str) -> str:
    """A text of so many words; another seed gives other words from the first one on."""
    dice = random.Random(seed)
    return " ".join(dice.choices(WORDS, k=num_words))
