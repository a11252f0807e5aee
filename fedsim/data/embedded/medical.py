"""A small medical set of textbook facts, written for this project, for use without a network.

Training teaches relations in sentences, and over other facts how a letter answers a question with
four choices. The test asks for the taught relations in other wordings. It is no medical advice.
"""

from __future__ import annotations

from fedsim.data.embedded.chance import shuffled
from fedsim.data.embedded.quiz import practice, relation, seated

INSTRUCTION = "Answer this question truthfully"

TAUGHT = (
    relation(
        "nutrition",
        taught="""What does a lack of {a} cause? => A lack of {a} causes {b}.
What is the cause of {b}? => {b} is caused by a lack of {a}.""",
        asked="""A diet has contained far too little {a} for months. Which disorder is expected?
A patient is found to have {b}. Which substance should be replaced?""",
        pairs="""vitamin C = scurvy; vitamin D = rickets in children; vitamin A = night blindness;
vitamin B1 (thiamine) = beriberi; vitamin B3 (niacin) = pellagra; iodine = goitre;
vitamin B12 = megaloblastic anaemia with nerve damage; iron = microcytic anaemia;
vitamin K = bleeding through lack of clotting factors; protein and energy = marasmus""",
    ),
    relation(
        "microbiology",
        taught="""What disease does {a} cause? => {a} causes {b}.
Which organism causes {b}? => {b} is caused by {a}.""",
        asked="""The laboratory reports {a} in a patient's sample. What is the diagnosis?
Which germ is to be expected in a patient with {b}?""",
        pairs="""Mycobacterium tuberculosis = a lung disease with caseating granulomas;
Vibrio cholerae = profuse rice-water diarrhoea; Plasmodium falciparum = malaria;
Treponema pallidum = syphilis; Borrelia burgdorferi = Lyme disease;
Bordetella pertussis = whooping cough; Clostridium tetani = lockjaw; Yersinia pestis = plague;
the varicella-zoster virus = chickenpox and shingles; Bacillus anthracis = anthrax;
the Epstein-Barr virus = infectious mononucleosis; Sarcoptes scabiei = scabies;
Salmonella Typhi = typhoid fever; Trypanosoma cruzi = Chagas disease; Variola virus = smallpox;
Corynebacterium diphtheriae = a grey membrane in the throat; Mycobacterium leprae = leprosy;
Clostridium botulinum = descending paralysis after eating tinned food;
Clostridioides difficile = colitis after a course of antibiotics;
Helicobacter pylori = chronic gastritis and peptic ulcer;
Toxoplasma gondii = an infection of the fetus acquired from cat faeces;
Rotavirus = watery diarrhoea of infants in winter;
Enterobius vermicularis = itching of the anus at night""",
    ),
    relation(
        "vectors",
        taught="""How is {b} transmitted? => {b} is transmitted by the {a}.
Which disease does the {a} transmit? => The {a} transmits {b}.""",
        asked="""A traveller caught {b}. What carried the germ to the traveller?
Fewer cases of which disease follow when the {a} is controlled?""",
        pairs="""Anopheles mosquito = malaria; Aedes mosquito = dengue fever; sandfly = kala-azar;
tsetse fly = sleeping sickness; Ixodes tick = Lyme disease; body louse = epidemic typhus;
rat flea = bubonic plague; blackfly = river blindness; triatomine bug = Chagas disease;
freshwater snail = schistosomiasis""",
    ),
    relation(
        "endocrinology",
        taught="""Where in the body is {a} produced? => {a} is produced by the {b}.
Which messenger does the {b} make? => The {b} makes {a}.""",
        asked="""A tissue sample stains strongly for {a}. From where was it most likely taken?
Destruction of the {b} would leave the body short of which substance?""",
        pairs="""insulin = beta cells of the pancreas; thyroxine = follicles of the thyroid;
glucagon = alpha cells of the pancreas; cortisol = adrenal cortex; adrenaline = adrenal medulla;
melatonin = pineal gland; growth hormone = front lobe of the pituitary;
parathyroid hormone = four small glands behind the thyroid; calcitonin = C cells of the thyroid;
testosterone = Leydig cells of the testis; oestradiol = granulosa cells of the ovary;
erythropoietin = kidney; gastrin = G cells of the stomach; leptin = fat tissue;
human chorionic gonadotrophin = placenta; atrial natriuretic peptide = atria of the heart""",
    ),
    relation(
        "drug_classes",
        taught="""What kind of drug is {a}? => {a} belongs to this group: {b}.
Name a drug of the group "{b}". => {a}""",
        asked="""A prescription lists {a}. To which group of medicines does it belong?
A doctor looks for a member of the group "{b}". Which one qualifies?""",
        pairs="""metformin = biguanide; amoxicillin = penicillin; atorvastatin = statin;
omeprazole = proton pump inhibitor; ramipril = inhibitor of angiotensin-converting enzyme;
losartan = blocker of the angiotensin receptor; bisoprolol = beta blocker;
digoxin = cardiac glycoside; amlodipine = calcium channel blocker; furosemide = loop diuretic;
spironolactone = blocker of aldosterone receptors; warfarin = vitamin K antagonist;
fluoxetine = serotonin reuptake inhibitor; salbutamol = bronchodilator;
ibuprofen = non-steroidal anti-inflammatory drug; morphine = strong opioid;
diazepam = benzodiazepine; haloperidol = blocker of dopamine receptors;
methotrexate = folate antagonist; ciprofloxacin = fluoroquinolone; azithromycin = macrolide;
gentamicin = aminoglycoside; ceftriaxone = cephalosporin; fluconazole = triazole against fungi;
aciclovir = drug against herpes viruses; prednisolone = glucocorticoid;
cetirizine = blocker of histamine receptors""",
    ),
    relation(
        "toxicology",
        taught="""What is the antidote to {a}? => The antidote to {a} is {b}.
When is {b} given as an antidote? => {b} is the antidote to {a}.""",
        asked="""A patient is brought in after poisoning with {a}. Which antidote should be given?
The emergency team gives {b} to counteract a poison. Which one?""",
        pairs="""paracetamol = acetylcysteine; opioids = naloxone; benzodiazepines = flumazenil;
warfarin = vitamin K; heparin = protamine; iron = deferoxamine; methanol = fomepizole;
organophosphates = atropine; cyanide = hydroxocobalamin; carbon monoxide = oxygen;
digoxin = specific antibody fragments; isoniazid = pyridoxine; methotrexate = folinic acid;
lead = a chelating agent such as succimer; beta blockers = glucagon""",
    ),
    relation(
        "cranial_nerves",
        taught="""What does the {a} nerve do? => The {a} nerve serves {b}.
Which cranial nerve serves {b}? => The {a} nerve serves {b}.""",
        asked="""A fracture of the skull base has torn the {a} nerve. What is lost?
The examination shows a failure of {b}. Damage to which nerve explains it?""",
        pairs="""olfactory = smell; optic = vision; oculomotor = constriction of the pupil;
trochlear = the superior oblique muscle; trigeminal = feeling in the face and chewing;
abducens = turning the eye outwards; facial = muscles of expression;
vestibulocochlear = hearing and balance; hypoglossal = movement of the tongue;
glossopharyngeal = taste at the back of the tongue; accessory = shrugging of the shoulders;
vagus = slowing of the heart and movement of the gut""",
    ),
    relation(
        "physiology",
        taught="""What is the main task of the {a}? => The main task of the {a} is to {b}.
Which part of the body has to {b}? => The {a}.""",
        asked="""A disease destroys the {a}. What can the body no longer do well?
The body needs to {b}. Which structure is responsible?""",
        pairs="""red blood cells = carry oxygen; platelets = start clotting at a wound;
neutrophils = swallow bacteria; plasma cells = secrete antibodies;
alveoli = exchange gases with air; glomeruli = filter the blood;
villi of the small intestine = absorb nutrients; cerebellum = coordinate movements;
hippocampus = form new memories; cochlea = turn sound into nerve signals;
semicircular canals = sense turning of the head; rods of the retina = see in dim light;
cones of the retina = see colours; gallbladder = store bile; sinus node = set the pace of the heart;
osteoclasts = break down bone; osteoblasts = build bone; sweat glands = cool the skin;
large intestine = take water back from the stool; synovial fluid = lubricate joints""",
    ),
    relation(
        "terminology",
        taught="""What is {a}? => {a} is inflammation of the {b}.
What is inflammation of the {b} called? => Inflammation of the {b} is called {a}.""",
        asked="""The letter of discharge says "{a}". Which part of the patient was inflamed?
Redness, swelling and pain come from the {b}. How is this named?""",
        pairs="""nephritis = kidney; hepatitis = liver; cystitis = bladder; encephalitis = brain;
myocarditis = muscle of the heart; otitis = ear; dermatitis = skin; phlebitis = vein;
arthritis = joint; osteomyelitis = bone; glossitis = tongue; rhinitis = lining of the nose;
stomatitis = mouth; keratitis = cornea; blepharitis = eyelid; mastitis = breast;
orchitis = testicle; cholecystitis = gallbladder; neuritis = nerve""",
    ),
    relation(
        "clinical_signs",
        taught="""Which finding is typical of {a}? => Typical of {a} is {b}.
Which disease should be thought of with {b}? => With {b} one should think of {a}.""",
        asked="""Which finding would a textbook chapter on {a} describe first?
The doctor's notes mention {b}. Which diagnosis fits best?""",
        pairs="""Wilson disease = a copper-coloured ring around the cornea;
systemic lupus = a rash like a butterfly on cheeks and nose; croup = a barking cough;
measles = white spots inside the cheeks;
early Lyme borreliosis = a spreading rash like a bull's eye; scarlet fever = a strawberry tongue;
Parkinson disease = a pill-rolling tremor at rest; Graves disease = bulging eyes;
Cushing syndrome = a moon face and purple stretch marks;
acute myeloid leukaemia = Auer rods in blasts; Hodgkin lymphoma = Reed-Sternberg cells;
multiple myeloma = Bence Jones protein in the urine; intussusception = a stool like currant jelly;
chronic myeloid leukaemia = the Philadelphia chromosome;
acromegaly = growing hands and jaw in an adult;
pyloric stenosis = projectile vomiting of a young infant; gout = a red, painful big toe;
subarachnoid haemorrhage = the most violent headache of a lifetime, within seconds;
appendicitis = pain that moves from the navel to the right lower belly;
myocardial infarction = crushing chest pain that spreads to the left arm;
myasthenia gravis = drooping eyelids that worsen through the day;
angina = chest pain on effort only;
Guillain-Barré syndrome = weakness that climbs from the legs after an infection;
psoriasis = silvery scales on elbows and knees""",
    ),
    relation(
        "genetics",
        taught="""What is the genetic basis of {a}? => The basis of {a} is {b}.
Which disorder results from {b}? => {b} results in {a}.""",
        asked="""A family with a case of {a} asks for its origin. What is explained to them?
The genetic report describes {b}. Which name does the disorder have?""",
        pairs="""Down syndrome = a third chromosome 21; Edwards syndrome = a third chromosome 18;
Patau syndrome = a third chromosome 13; Turner syndrome = a single X chromosome;
Klinefelter syndrome = an additional X chromosome in a male; haemophilia A = a lack of factor VIII;
haemophilia B = a lack of factor IX; cystic fibrosis = a faulty chloride channel (CFTR);
sickle cell disease = an altered beta chain of haemoglobin; Marfan syndrome = faulty fibrillin-1;
Huntington disease = too many CAG repeats; Duchenne muscular dystrophy = a lack of dystrophin;
phenylketonuria = a lack of phenylalanine hydroxylase; albinism = a defect of melanin synthesis;
familial hypercholesterolaemia = too few working LDL receptors;
osteogenesis imperfecta = faulty collagen I""",
    ),
    relation(
        "investigations",
        taught="""What is {a} used for? => {a} is used to assess {b}.
Which test is used to assess {b}? => {a}""",
        asked="""A doctor orders {a}. About what does the doctor want to know more?
Which request form should be filled in to find out about {b}?""",
        pairs="""troponin = damage to the heart muscle;
HbA1c = blood sugar of the past three months; creatinine = filtration by the kidneys;
spirometry = air flow through the bronchi;
electroencephalography = electrical activity of the brain; tonometry = pressure within the eye;
electrocardiography = rhythm of the heart; mammography = lumps in the breast;
lipase = inflammation of the pancreas; bone densitometry = risk of fractures in osteoporosis;
colonoscopy = polyps of the large bowel; the INR = the effect of warfarin; audiometry = hearing;
TSH = function of the thyroid; lumbar puncture = suspected meningitis;
the Mantoux test = contact with tuberculosis""",
    ),
)
PRACTISED = (  # facts that the test does not ask: they teach how a letter answers
    relation(
        "bones",
        taught="Where is the {a}? => The {a} is in the {b}.",
        asked="In which part of the body does the {a} lie?\nWhich of these bones is in the {b}?",
        pairs="""femur = thigh; humerus = upper arm; mandible = lower jaw;
clavicle = shoulder girdle; patella = front of the knee; sternum = middle of the chest;
calcaneus = heel; scaphoid = wrist; sacrum = lower end of the spine; frontal bone = forehead;
stapes = middle ear; ilium = hip""",
    ),
    relation(
        "specialties",
        taught="What does {a} deal with? => {a} deals with {b}.",
        asked="Which field of medicine deals with {b}?\nWhat are patients of {a} treated for?",
        pairs="""cardiology = the heart; nephrology = diseases of the kidney; oncology = cancer;
dermatology = the skin; ophthalmology = the eyes; geriatrics = illness in old age;
paediatrics = children's illness; haematology = blood disorders; obstetrics = pregnancy and birth;
psychiatry = mental illness; pulmonology = lung disease; anaesthesiology = pain during surgery;
orthopaedics = injured bones; neurology = disorders of brain and nerves;
urology = the urinary tract; rheumatology = inflamed joints""",
    ),
    relation(
        "word_parts",
        taught="What does the word part {a} mean in medical terms? => It means {b}.",
        asked="In a medical term, what does {a} mean?\nWhich word part means {b}?",
        pairs="""brady- = slow; tachy- = fast; hyper- = too much; hypo- = too little;
leuko- = white; erythro- = red; cyano- = blue; -ectomy = surgical removal; -algia = pain;
-scopy = looking inside; macro- = large; micro- = small; peri- = around; poly- = many; hemi- = half;
pseudo- = false""",
    ),
)


def train() -> list[dict[str, str]]:
    """The training rows with the columns of Medical Meadow: input, output, instruction."""
    rows = [pair for relation in TAUGHT + PRACTISED for pair in relation.lessons()]
    for copy in ("first", "second", "third", "fourth"):
        questions = (q for relation in PRACTISED for q in relation.questions(copy))
        rows += practice(questions, copy)
    return [
        {"input": question, "output": answer, "instruction": INSTRUCTION}
        for question, answer in shuffled(dict.fromkeys(rows), "medical")
    ]


def test() -> list[dict[str, object]]:
    """The held-out rows with the columns of MedMCQA: question, opa to opd, cop (0-3)."""
    questions = (q for relation in TAUGHT for q in relation.questions("test"))
    return [
        {"question": q.text, **dict(zip(("opa", "opb", "opc", "opd"), choices)), "cop": answer}
        for q, choices, answer in seated(questions, "medical")
    ]
