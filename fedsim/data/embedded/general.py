"""A small general knowledge set, written for this project, for use without a network.

Training teaches facts in sentences and holds exercises, among them questions with four choices that
a letter answers, over facts of their own. The test asks for the taught facts in other wordings, and
has exercises of kinds, with numbers and words that training does not have.
"""

from __future__ import annotations

from fedsim.data.embedded import exercises
from fedsim.data.embedded.chance import shuffled
from fedsim.data.embedded.quiz import relation, seated

TAUGHT = (
    relation(
        "world_geography",
        taught="""What is the capital of {a}? => The capital of {a} is {b}.
Tell me one thing about {b}. => {b} is the capital of {a}.""",
        asked="""Where does the government of {a} have its seat?
You land in {b} and want to see the capital around you. In which country are you?""",
        pairs="""Kenya = Nairobi; Peru = Lima; Norway = Oslo; Egypt = Cairo; Canada = Ottawa;
Australia = Canberra; Japan = Tokyo; Thailand = Bangkok; Poland = Warsaw; Portugal = Lisbon;
Hungary = Budapest; Cuba = Havana; Chile = Santiago; Colombia = Bogotá; Venezuela = Caracas;
Iran = Tehran; Iraq = Baghdad; Vietnam = Hanoi; the Philippines = Manila; Senegal = Dakar;
Ghana = Accra; Ethiopia = Addis Ababa; Uganda = Kampala; Zambia = Lusaka; Mongolia = Ulaanbaatar;
Nepal = Kathmandu; Greece = Athens; Finland = Helsinki; Iceland = Reykjavik; Ireland = Dublin;
Romania = Bucharest; Bulgaria = Sofia; Croatia = Zagreb; Latvia = Riga; Austria = Vienna;
Morocco = Rabat; Cambodia = Phnom Penh; Jordan = Amman; Uruguay = Montevideo;
New Zealand = Wellington""",
    ),
    relation(
        "money",
        taught="""Which currency is used in {a}? => The currency of {a} is the {b}.
Where do people pay with the {b}? => In {a}.""",
        asked="""A shop in {a} writes its prices in which unit of money?
A traveller has a purse full of the {b}. Which country issued that money?""",
        pairs="""Japan = yen; Poland = zloty; Hungary = forint; Thailand = baht; Vietnam = dong;
South Africa = rand; Israel = shekel; Ukraine = hryvnia; Malaysia = ringgit; Indonesia = rupiah;
Nigeria = naira; Ghana = cedi; Guatemala = quetzal; Ethiopia = birr; Bangladesh = taka;
Mongolia = tugrik; Brazil = real; Georgia = lari; Kazakhstan = tenge; Albania = lek; Armenia = dram;
Haiti = gourde; Peru = sol; Botswana = pula""",
    ),
    relation(
        "landmarks",
        taught="""Where is the {a}? => The {a} is in {b}.
Suggest something to see in {b}. => In {b} you can see the {a}.""",
        asked="""A visitor wants to stand before the {a}. To which city should the visitor travel?
Which of these sights belongs on a walk through {b}?""",
        pairs="""Eiffel Tower = Paris; Colosseum = Rome; Acropolis = Athens; Tower Bridge = London;
Brandenburg Gate = Berlin; Sagrada Família = Barcelona; Kremlin = Moscow;
Statue of Liberty = New York; Golden Gate Bridge = San Francisco; Hagia Sophia = Istanbul;
Forbidden City = Beijing; Burj Khalifa = Dubai; statue of Christ the Redeemer = Rio de Janeiro;
Charles Bridge = Prague; statue of the Little Mermaid = Copenhagen; Rijksmuseum = Amsterdam;
Prado Museum = Madrid; Uffizi Gallery = Florence; Doge's Palace = Venice; Western Wall = Jerusalem;
Schönbrunn Palace = Vienna; Atomium = Brussels; CN Tower = Toronto; Space Needle = Seattle""",
    ),
    relation(
        "history",
        taught="""When was {a}? => In {b}.
Name an event of the year {b}. => {a} was in {b}.""",
        asked="""Which year does a history book give for {a}?
Which of these belongs to the year {b}?""",
        pairs="""the storming of the Bastille = 1789;
the American Declaration of Independence = 1776; the sealing of Magna Carta = 1215;
the Battle of Hastings = 1066; the first voyage of Columbus to America = 1492;
the beginning of the First World War = 1914; the end of the Second World War = 1945;
the first landing of people on the Moon = 1969; the fall of the Berlin Wall = 1989;
the October Revolution in Russia = 1917; the Battle of Waterloo = 1815;
the fall of Constantinople to the Ottomans = 1453; the Great Fire of London = 1666;
the Wall Street Crash = 1929; the sinking of the Titanic = 1912;
the first powered flight of the Wright brothers = 1903; the opening of the Suez Canal = 1869;
the independence of India = 1947; the launch of Sputnik 1 = 1957; the disaster at Chernobyl = 1986;
the Treaty of Versailles = 1919; the publication of Luther's Ninety-five Theses = 1517;
the Peace of Westphalia = 1648; the defeat of the Spanish Armada = 1588""",
    ),
    relation(
        "world_literature",
        taught="""Who wrote {a}? => {a} was written by {b}.
Name a work by {b}. => {a}""",
        asked="""Whose name is on the cover of {a} as its author?
Which of these came from the pen of {b}?""",
        pairs="""Pride and Prejudice = Jane Austen; Hamlet = William Shakespeare;
Don Quixote = Miguel de Cervantes; War and Peace = Leo Tolstoy; Moby-Dick = Herman Melville;
Crime and Punishment = Fyodor Dostoevsky; The Odyssey = Homer; Candide = Voltaire;
The Divine Comedy = Dante Alighieri; Faust = Johann Wolfgang von Goethe;
Les Misérables = Victor Hugo; Madame Bovary = Gustave Flaubert; Oliver Twist = Charles Dickens;
Frankenstein = Mary Shelley; Dracula = Bram Stoker; Jane Eyre = Charlotte Brontë;
Wuthering Heights = Emily Brontë; The Trial = Franz Kafka; Ulysses = James Joyce;
Nineteen Eighty-Four = George Orwell; Brave New World = Aldous Huxley;
The Great Gatsby = F. Scott Fitzgerald; The Old Man and the Sea = Ernest Hemingway;
One Hundred Years of Solitude = Gabriel García Márquez; The Hobbit = J. R. R. Tolkien;
Metamorphoses = Ovid; The Aeneid = Virgil; Things Fall Apart = Chinua Achebe;
A Doll's House = Henrik Ibsen; The Cherry Orchard = Anton Chekhov""",
    ),
    relation(
        "music",
        taught="""Who composed {a}? => {a} was composed by {b}.
Name a piece of music by {b}. => {a}""",
        asked="""Whose notes does an orchestra play when {a} is on the programme?
Which of these did {b} put on paper?""",
        pairs="""The Four Seasons = Antonio Vivaldi; The Magic Flute = Wolfgang Amadeus Mozart;
Swan Lake = Pyotr Ilyich Tchaikovsky; The Ring of the Nibelung = Richard Wagner;
La Traviata = Giuseppe Verdi; Carmen = Georges Bizet; Boléro = Maurice Ravel;
Messiah = George Frideric Handel; The Creation = Joseph Haydn; Fidelio = Ludwig van Beethoven;
Madama Butterfly = Giacomo Puccini; The Planets = Gustav Holst; Finlandia = Jean Sibelius;
The Rite of Spring = Igor Stravinsky; The Barber of Seville = Gioachino Rossini;
The Well-Tempered Clavier = Johann Sebastian Bach; Clair de lune = Claude Debussy;
Rhapsody in Blue = George Gershwin; Pictures at an Exhibition = Modest Mussorgsky;
The New World Symphony = Antonín Dvořák""",
    ),
    relation(
        "history_of_science",
        taught="""Who is known for {a}? => {b} is known for {a}.
What is {b} known for? => {b} is known for {a}.""",
        asked="""Which person does science remember because of {a}?
What do we owe to {b}?""",
        pairs="""the discovery of penicillin = Alexander Fleming;
natural selection = Charles Darwin; the theory of relativity = Albert Einstein;
the periodic table = Dmitri Mendeleev; the laws of planetary motion = Johannes Kepler;
the discovery of radium = Marie Curie; the discovery of X-rays = Wilhelm Röntgen;
the first vaccine = Edward Jenner; the circulation of the blood = William Harvey;
dynamite = Alfred Nobel; the law of gravitation = Isaac Newton;
the laws of inheritance in peas = Gregor Mendel; the discovery of the neutron = James Chadwick;
the discovery of the electron = J. J. Thomson;
printing with movable type in Europe = Johannes Gutenberg; the World Wide Web = Tim Berners-Lee;
the Sun at the centre of the planets = Nicolaus Copernicus; continental drift = Alfred Wegener;
electromagnetic induction = Michael Faraday; the electric battery = Alessandro Volta""",
    ),
    relation(
        "chemistry",
        taught="""What is the chemical symbol of {a}? => The chemical symbol of {a} is {b}.
What does {b} stand for in a chemical formula? => {b} stands for {a}.""",
        asked="""In the periodic table a box is marked {b}. Which element is that?
How do chemists abbreviate {a}?""",
        pairs="""hydrogen = H; nitrogen = N; oxygen = O; neon = Ne; sodium = Na; magnesium = Mg;
sulfur = S; chlorine = Cl; potassium = K; calcium = Ca; iron = Fe; nickel = Ni; copper = Cu;
zinc = Zn; silver = Ag; tin = Sn; antimony = Sb; iodine = I; tungsten = W; gold = Au; mercury = Hg;
lead = Pb; uranium = U; helium = He""",
    ),
    relation(
        "physics",
        taught="""In which SI unit is {a} measured? => The SI unit of {a} is the {b}.
Explain what the {b} is. => The {b} is the SI unit of {a}.""",
        asked="""A physicist writes down a value of {a}. Which unit follows the number?
A number is followed by the {b}. Which quantity does it describe?""",
        pairs="""force = newton; energy = joule; power = watt; frequency = hertz; pressure = pascal;
electric current = ampere; electric potential = volt; electrical resistance = ohm;
electric charge = coulomb; capacitance = farad; inductance = henry; magnetic flux = weber;
magnetic flux density = tesla; mass = kilogram; length = metre; time = second; temperature = kelvin;
amount of substance = mole; luminous intensity = candela; radioactivity = becquerel;
absorbed dose of radiation = gray; plane angle = radian; luminous flux = lumen;
illuminance = lux""",
    ),
    relation(
        "instruments",
        taught="""What is a device called {a} for? => It measures {b}.
Name a device that measures {b}. => {a}""",
        asked="""Somebody reads off the {a}. What does the reading tell?
Which tool should be taken along to find out the {b}?""",
        pairs="""thermometer = temperature; barometer = air pressure; hygrometer = humidity;
anemometer = wind speed; seismograph = shaking of the ground; odometer = distance driven;
ammeter = electric current; altimeter = height above the sea; tachometer = speed of rotation;
hydrometer = density of a liquid; protractor = angle between two lines; dynamometer = force;
stopwatch = time that has passed; photometer = strength of light; rain gauge = amount of rain;
audiometer = ability to hear""",
    ),
    relation(
        "fields_of_study",
        taught="""What does {a} study? => {a} is the study of {b}.
What is the study of {b} called? => {a}""",
        asked="""A professor of {a} knows most about which of these?
Somebody who is curious about {b} should take a course in which field?""",
        pairs="""botany = plants; entomology = insects; ornithology = birds; ichthyology = fish;
mycology = fungi; seismology = earthquakes; meteorology = weather; linguistics = languages;
palaeontology = fossils; numismatics = coins; hydrology = water on land; cytology = cells;
psychology = the mind; demography = human populations; acoustics = sound; optics = light;
herpetology = reptiles and amphibians; vexillology = flags; toxicology = poisons;
astronomy = stars and galaxies; criminology = crime; pedagogy = teaching""",
    ),
    relation(
        "biology",
        taught="""What is the job of the {a}? => The {a} {b}.
Which part of a living thing {b}? => The {a}.""",
        asked="""If the {a} failed, what would no longer work? Choose what it does.
Choose the part of which this is true: it {b}.""",
        pairs="""mitochondrion = releases energy from food inside a cell;
ribosome = builds proteins; chloroplast = captures sunlight to make sugar;
cell nucleus = keeps most of the DNA; cell membrane = decides what enters and leaves a cell;
root = takes up water from the soil; xylem = carries water up a plant;
phloem = carries sugar through a plant; stamen = makes pollen; petal = attracts pollinators;
gill = takes oxygen out of water; heart = pumps blood; kidney = filters waste out of the blood;
liver = makes bile; retina = turns light into signals; eardrum = vibrates when sound arrives;
diaphragm = draws air into the lungs; tendon = ties a muscle to a bone""",
    ),
    relation(
        "young_animals",
        taught="""What is the young of a {a} called? => The young of a {a} is called a {b}.
What will a {b} be when it has grown up? => A {a}.""",
        asked="""A {a} has just become a parent. What do we call the little one?
A {b} has which animal as its mother?""",
        pairs="""horse = foal; cow = calf; sheep = lamb; goat = kid; goose = gosling; swan = cygnet;
kangaroo = joey; deer = fawn; hare = leveret; frog = tadpole; dog = puppy; cat = kitten; bear = cub;
hen = chick; butterfly = caterpillar; turkey = poult; pigeon = squab""",
    ),
    relation(
        "vocabulary",
        taught="""What is the opposite of {a}? => The opposite of {a} is {b}.
Give a word that means the contrary of {b}. => {a}""",
        asked="""Something that is not {a} at all is most likely what?
Which word fits: it was by no means {b}, it was rather the reverse, namely ...?""",
        pairs="""hot = cold; early = late; full = empty; rough = smooth; brave = cowardly;
generous = stingy; ancient = modern; guilty = innocent; transparent = opaque; shallow = deep;
rare = common; permanent = temporary; artificial = natural; humble = proud; sharp = blunt;
loose = tight; wet = dry; cheap = expensive; strong = weak; narrow = wide; heavy = light;
public = private; polite = rude; lazy = hard-working; awake = asleep; absent = present;
noisy = quiet; bitter = sweet""",
    ),
    relation(
        "synonyms",
        taught="""Give another word for the verb "{a}". => {b}
Which verb means the same as "{b}"? => {a}""",
        asked="""A child asks what it means to {a}. Which short explanation is right?
An author has used "{b}" too often. Which verb can stand in for it?""",
        pairs="""commence = start; purchase = buy; assist = help; mend = repair; conceal = hide;
reply = answer; depart = leave; permit = allow; gather = collect; select = choose; attempt = try;
require = need; weep = cry; discover = find; observe = watch; demolish = destroy; construct = build;
prohibit = ban; imitate = copy; rescue = save; complete = finish; toss = throw; shut = close;
elevate = lift""",
    ),
    relation(
        "economics_and_politics",
        taught="""What is meant by {a}? => {a} means {b}.
Give the term for this: {b}. => {a}""",
        asked="""The headline has the word "{a}" in it. What is the article about?
One word sums up "{b}". Which word?""",
        pairs="""inflation = a general rise in prices; monopoly = a market with a single seller;
tariff = a tax on imported goods; referendum = a direct vote of the people on a question;
veto = the power to block a decision; constitution = the highest law of a state;
coalition = an alliance of parties that govern together; oligarchy = rule by a few;
monarchy = rule by a king or queen; census = an official count of the population;
subsidy = public money that supports an industry; embargo = a ban on trade with a country;
recession = a time in which the economy shrinks; barter = exchange of goods without money;
dividend = a share of profit paid to the owners; mortgage = a loan secured by a house;
bankruptcy = being unable to pay debts; treaty = a formal agreement between states;
amnesty = a pardon for a whole group; lobbying = trying to influence lawmakers;
suffrage = the right to vote; asylum = protection given to refugees""",
    ),
    relation(
        "philosophy",
        taught="""What does {a} claim? => {a} claims that {b}.
Which view claims that {b}? => {a}""",
        asked="""Which sentence would a follower of {a} sign?
Somebody is convinced that {b}. What is that position called?""",
        pairs="""empiricism = knowledge comes from the senses;
determinism = every event has prior causes; rationalism = knowledge comes from reason;
hedonism = pleasure is the highest good;
utilitarianism = an act is right if it brings the most happiness to all;
scepticism = nothing can be known for certain; pacifism = war is never justified;
atheism = there is no god; monotheism = there is only one god; polytheism = there are many gods;
solipsism = only my own mind surely exists; materialism = only matter is real;
nihilism = life has no meaning; dualism = mind and body are two different things""",
    ),
    relation(
        "mythology",
        taught="""What did the Romans call the Greek {a}? => {a} was called {b} in Rome.
Which Greek deity is the same as the Roman {b}? => {a}""",
        asked="""A Greek statue shows {a}. Which name would a Roman have used?
A Roman temple honours {b}. To whom would a Greek have prayed there?""",
        pairs="""Zeus = Jupiter; Hera = Juno; Poseidon = Neptune; Ares = Mars; Aphrodite = Venus;
Hermes = Mercury; Athena = Minerva; Artemis = Diana; Hephaestus = Vulcan; Dionysus = Bacchus;
Demeter = Ceres; Hades = Pluto""",
    ),
)


def train() -> list[dict[str, str]]:
    """The training rows with the columns of Alpaca: instruction, input, output."""
    names = ("instruction", "input", "output")
    rows = [(q, "", a) for relation in TAUGHT for q, a in relation.lessons()] + exercises.train()
    return [dict(zip(names, row)) for row in shuffled(rows, "general")]


def test() -> list[dict[str, object]]:
    """The held-out rows with the columns of MMLU: question, subject, choices, answer (0-3)."""
    questions = [q for relation in TAUGHT for q in relation.questions("test")]
    return [
        {"question": q.text, "subject": q.subject, "choices": list(choices), "answer": answer}
        for q, choices, answer in seated(questions + exercises.test(), "general")
    ]
