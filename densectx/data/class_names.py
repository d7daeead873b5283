"""Class names and colours of well-known data sets, in the order of their ids."""

from __future__ import annotations

from densectx.palette import Palette


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _palette(text: str) -> Palette:
    """Colours written as six hexadecimal digits."""
    return tuple((int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in text.split())


CAMVID = _names("Sky,Building,Pole,Road,Pavement,Tree,SignSymbol,Fence,Car,Pedestrian,Bicyclist")
CAMVID_PALETTE = _palette("808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0")

ROAD = _names("Building,Tree,Sky,Car,Sign,Road,Pedestrian,Fence,Pole,Sidewalk,Bicyclist")
"""The 11 classes of tables 5 and 6 of Yu & Koltun (2016), CamVid and KITTI, in the order of the published weights."""
ROAD_PALETTE = _palette("800000 808000 808080 400080 c08080 804080 404000 404080 c0c080 0000c0 0080c0")

VOC = _names(
    "background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,"
    "pottedplant,sheep,sofa,train,tvmonitor"
)

CITYSCAPES = _names(
    "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,"
    "bus,train,motorcycle,bicycle"
)
CITYSCAPES_PALETTE = _palette(
    "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64"
    " 005064 0000e6 770b20"
)
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""``labelIds`` of the 19 classes that are evaluated; the rest of -1..33 is ignored."""

ADE20K = _names(
    "wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,earth,door,table,mountain,"
    "plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,field,armchair,seat,fence,desk,rock,"
    "wardrobe,lamp,bathtub,railing,cushion,base,box,column,signboard,chest of drawers,counter,sand,sink,skyscraper,"
    "fireplace,refrigerator,grandstand,path,stairs,runway,case,pool table,pillow,screen door,stairway,river,bridge,"
    "bookcase,blind,coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,computer,"
    "swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,streetlight,booth,"
    "television receiver,airplane,dirt track,apparel,pole,land,bannister,escalator,ottoman,bottle,buffet,poster,stage,"
    "van,ship,fountain,conveyer belt,canopy,washer,plaything,swimming pool,stool,barrel,basket,waterfall,tent,bag,"
    "minibike,cradle,oven,ball,food,step,tank,trade name,microwave,pot,animal,bicycle,lake,dishwasher,screen,blanket,"
    "sculpture,hood,sconce,vase,traffic light,tray,ashcan,fan,pier,crt screen,plate,monitor,bulletin board,shower,"
    "radiator,glass,clock,flag"
)
"""The first name of each of the 150 classes of the scene parsing benchmark (its objectInfo150.txt)."""
